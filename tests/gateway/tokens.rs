//! Authentication over the JSON API, beside a real etcd.

use crate::{client::post, pair::Pair};

fn log_in(address: &str, name: &str) -> String {
    let body = format!("{{\"name\":\"{name}\",\"password\":\"{name}\"}}");
    let answer = post(address, "/v3/auth/authenticate", &[], body.as_bytes());
    let answer: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
    answer["token"].as_str().unwrap().to_owned()
}

#[test]
fn tokens_identify_users_as_in_etcd() {
    let Some(mut pair) = Pair::start(&[]) else { return };
    for (path, body) in [
        ("/v3/auth/user/add", r#"{"name":"root","password":"root"}"#),
        ("/v3/auth/role/add", r#"{"name":"root"}"#),
        ("/v3/auth/user/grant", r#"{"user":"root","role":"root"}"#),
        ("/v3/auth/user/add", r#"{"name":"user","password":"user"}"#),
        ("/v3/auth/role/add", r#"{"name":"role"}"#),
        ("/v3/auth/role/grant", r#"{"name":"role","perm":{"permType":"READ","key":"Zm9v"}}"#),
        ("/v3/auth/user/grant", r#"{"user":"user","role":"role"}"#),
        ("/v3/kv/put", r#"{"key":"Zm9v","value":"YmFy"}"#),
        ("/v3/auth/enable", "{}"),
        ("/v3/auth/authenticate", r#"{"name":"user","password":"wrong"}"#),
        ("/v3/auth/authenticate", r#"{"name":"user","password":"user"}"#),
    ] {
        pair.post(path, &[], body.as_bytes());
    }
    let tokens = ["root", "user"].map(|name| [&pair.ours, &pair.etcd].map(|server| log_in(server.address(), name)));
    let requests = [
        ("/v3/kv/range", r#"{"key":"Zm9v"}"#),
        ("/v3/kv/range", r#"{"key":"Zm8="}"#),
        ("/v3/kv/put", r#"{"key":"Zm8="}"#),
        ("/v3/lease/keepalive", r#"{"ID":"5"}"#),
        ("/v3/lock/lock", r#"{"name":"bG9jaw==","lease":"5"}"#),
        ("/v3/election/leader", r#"{"name":"ZQ=="}"#),
        ("/v3/maintenance/status", "{}"),
        ("/v3/maintenance/defragment", "{}"),
        ("/v3/cluster/member/list", "{}"),
        ("/v3/auth/status", "{}"),
        ("/v3/auth/user/get", r#"{"name":"user"}"#),
    ];
    for (path, body) in requests {
        pair.post(path, &[], body.as_bytes());
        for headers in [
            &[("Authorization", "wrong")][..],
            &[("Grpc-Metadata-Token", "wrong")],
            &[("Grpc-Metadata-Token", "wrong"), ("Authorization", "Bearer wrong")],
            &[("Authorization", "")],
        ] {
            pair.post(path, headers, body.as_bytes());
        }
        for [ours, theirs] in &tokens {
            for (name, prefix) in [("Authorization", ""), ("Authorization", "Bearer "), ("Grpc-Metadata-Token", "")] {
                let ask = |address: &str, token: &str| {
                    let answer = post(address, path, &[(name, &format!("{prefix}{token}"))], body.as_bytes());
                    crate::client::Answer { body: crate::pair::comparable(&answer.body, &[]), ..answer }
                };
                let answers = (ask(pair.ours.address(), ours), ask(pair.etcd.address(), theirs));
                pair.compare(&format!("{path} {body} with {name}: {prefix}..."), answers.0, answers.1);
            }
        }
    }
    // A watch is refused in its first line.
    let lines = [&pair.ours, &pair.etcd].map(|server| {
        let body = r#"{"create_request":{"key":"Zm8="}}"#;
        let mut watch =
            crate::client::Exchange::post(server.address(), "/v3/watch", &[("Authorization", "wrong")], body);
        crate::pair::comparable(&watch.next_line().unwrap(), &[])
    });
    let [ours, theirs] = lines;
    assert!(ours.contains("invalid auth token"), "{ours}");
    pair.compare("a watch with a wrong token", ours, theirs);
    pair.finish();
}
