#![no_main]

libfuzzer_sys::fuzz_target!(init: metastore_fuzz::begin("connection"), |data: &[u8]| metastore_fuzz::connection::run(data));
