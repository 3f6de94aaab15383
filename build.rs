//! Turns `proto/` into Rust: messages, the clients that the load generator and tests use, and the descriptor that gRPC
//! reflection serves. Needs no `protoc`.

use std::{env, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["rpc", "raft_internal", "kv", "auth", "membership", "v3lock", "v3election", "lease"]
        .map(|name| format!("etcd/{name}.proto"));
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(&files, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_server(false)
        .bytes(".") // A field borrows the buffer that it came in; nothing is copied.
        .compile_fds(descriptors)?;
    Ok(())
}
