#![no_main]

libfuzzer_sys::fuzz_target!(init: metastore_fuzz::begin("encoder"), |data: &[u8]| metastore_fuzz::encoder::run(data));
