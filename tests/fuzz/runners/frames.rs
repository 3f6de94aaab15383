#![no_main]

libfuzzer_sys::fuzz_target!(init: metastore_fuzz::begin("frames"), |data: &[u8]| metastore_fuzz::frames::run(data));
