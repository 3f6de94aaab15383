#![no_main]

libfuzzer_sys::fuzz_target!(init: metastore_fuzz::begin("headers"), |data: &[u8]| metastore_fuzz::headers::run(data));
