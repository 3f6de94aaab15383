//! Compiles `proto/` into Rust: messages, the clients that the load generator and the tests use, and the descriptor set that
//! gRPC reflection serves. Needs no `protoc`.

use std::{env, fs, io, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let with_file = |error: protox::Error| format!("{}: {error}", error.file().unwrap_or("proto"));
    let files = [files_in("proto/etcd")?, files_in("proto/grpc")?].concat();
    let descriptors = protox::compile(files, ["proto"]).map_err(with_file)?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_server(false)
        .bytes(".") // A field is a slice of the buffer that the message was decoded from; nothing is copied.
        .compile_fds(descriptors)?;
    Ok(())
}

/// All files of a directory, sorted, so that the generated code is reproducible. Unused files are compiled as well.
fn files_in(directory: &str) -> io::Result<Vec<PathBuf>> {
    let mut files = fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}
