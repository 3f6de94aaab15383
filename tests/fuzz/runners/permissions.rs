#![no_main]

libfuzzer_sys::fuzz_target!(init: metastore_fuzz::begin("permissions"), |data: &[u8]| metastore_fuzz::permissions::run(data));
