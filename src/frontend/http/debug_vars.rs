//! `/debug/vars`: the variables that etcd publishes with Go's package expvar, as one JSON object. The statistics of Go's memory
//! have no counterpart here.

use std::sync::Arc;

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use rustix::process::{Resource, getrlimit};
use serde_json::{Map, Value, json};

use crate::{node::replica::RaftStatus, service::Service};

/// All variables, sorted by name, a line each.
pub async fn variables(State(service): State<Arc<Service>>) -> Response {
    let arguments: Vec<_> = std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let status = service.raft_status().await;
    let variables = [
        ("cmdline", json!(arguments)),
        ("file_descriptor_limit", json!(files)),
        ("raft.status", status.map_or(Value::Null, |status| raft_status(service.cluster.member_id, &status))),
    ];
    let lines = variables.map(|(name, value)| format!("\"{name}\": {value}"));
    let body = format!("{{\n{}\n}}\n", lines.join(",\n"));
    ([(header::CONTENT_TYPE, "application/json; charset=utf-8")], body).into_response()
}

fn raft_status(id: u64, status: &RaftStatus) -> Value {
    let hex = |id: u64| format!("{id:x}");
    let progress = status
        .progress
        .iter()
        .map(|member| (hex(member.id), json!({ "match": member.matched, "next": member.next, "state": member.state })));
    json!({
        "id": hex(id),
        "term": status.term,
        "vote": hex(status.vote),
        "commit": status.committed,
        "lead": hex(status.leader),
        "raftState": status.role,
        "applied": status.applied,
        "progress": progress.collect::<Map<_, _>>(),
        "leadtransferee": hex(status.transfers_to),
    })
}
