//! Turns `proto/` into Rust: messages, the clients that the load generator and tests use, and the descriptor that gRPC
//! reflection serves. Needs no `protoc`.

use std::{env, fs, io, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let named = |error: protox::Error| format!("{}: {error}", error.file().unwrap_or("proto"));
    let files = [every_file("proto/etcd")?, every_file("proto/grpc")?].concat();
    let descriptors = protox::compile(files, ["proto"]).map_err(named)?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_server(false)
        .bytes(".") // A field borrows the buffer that it came in; nothing is copied.
        .compile_fds(descriptors)?;
    Ok(())
}

/// All of a directory, in order, so that the same files come to the same code. A file that nobody uses is checked like the others.
fn every_file(directory: &str) -> io::Result<Vec<PathBuf>> {
    let mut files = fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}
