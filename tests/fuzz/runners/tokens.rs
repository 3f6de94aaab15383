#![no_main]

libfuzzer_sys::fuzz_target!(init: metastore_fuzz::begin("tokens"), |data: &[u8]| metastore_fuzz::tokens::run(data));
