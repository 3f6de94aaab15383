#![no_main]

libfuzzer_sys::fuzz_target!(init: metastore_fuzz::begin("database"), |data: &[u8]| metastore_fuzz::database::run(data));
