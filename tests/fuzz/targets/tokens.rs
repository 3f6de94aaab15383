//! Tokens: a JSON web token names a user only if it was signed with the key, with the configured method, and says so.

use std::{fs, sync::LazyLock, time::Duration};

use jsonwebtoken::{Algorithm, EncodingKey};
use metastore::{config::auth::JwtConfig, node::simple_tokens, service::auth::jwt::Jwt};
use serde_json::Value;

use super::input::Input;

const SECRET: &[u8] = b"a secret of the fuzz target";
/// In the year 2128: the token is valid.
const LATER: u64 = 5_000_000_000;

static JWT: LazyLock<Jwt> = LazyLock::new(|| {
    let directory = tempfile::tempdir().expect("there is a directory for temporary files");
    let path = directory.path().join("key");
    fs::write(&path, SECRET).expect("a new file is writable");
    let config = JwtConfig {
        method: "HS256".to_owned(),
        public_key: None,
        private_key: Some(path),
        ttl: Duration::from_mins(5),
    };
    Jwt::open(&config).expect("a secret can be used")
});

/// Decisions: the kind of the token, then its parts.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    match input.byte() % 4 {
        0 => raw(input.0),
        1 => signed(&mut input),
        _ => genuine(&mut input),
    }
}

/// Bytes as a client sends them. Random bytes contain no valid signature.
fn raw(bytes: &[u8]) {
    let Ok(token) = std::str::from_utf8(bytes) else { return };
    assert!(JWT.verify(token).is_none(), "{token:?} is not signed");
    if let Some(index) = simple_tokens::index_of(token) {
        let (_, after) = token.split_once('.').expect("an index is after a dot");
        assert_eq!(after.trim_start_matches(['+', '0']), index.to_string().trim_start_matches('0'));
    }
}

/// Any header and claims, with a signature that is right.
fn signed(input: &mut Input<'_>) {
    let (header, claims) = (input.piece(), input.0);
    let token = sign(header, claims);
    let Some((user, revision)) = JWT.verify(&token) else { return };
    let header: Value = serde_json::from_slice(header).expect("the header of a valid token is JSON");
    let claims: Value = serde_json::from_slice(claims).expect("the claims of a valid token are JSON");
    assert_eq!(header["alg"], "HS256");
    assert_eq!((claims["username"].as_str(), claims["revision"].as_u64()), (Some(&*user), Some(revision)));
    assert!(claims["exp"].as_f64().is_some_and(|until| until > 1_700_000_000.0), "it ends in the past: {claims}");
}

/// A valid token, which is accepted; then with one byte changed, which is refused.
fn genuine(input: &mut Input<'_>) {
    let (revision, change, at) = (u64::from(input.long()) << 16, input.byte(), usize::from(input.short()));
    let user = String::from_utf8_lossy(input.piece()).into_owned();
    let claims = serde_json::json!({ "username": user, "revision": revision, "exp": LATER });
    let mut token = sign(br#"{"alg":"HS256","typ":"JWT"}"#, claims.to_string().as_bytes());
    let verified = JWT.verify(&token).map(|(user, revision)| (user.to_string(), revision));
    assert_eq!(verified, Some((user, revision)), "{token}");
    let at = at % token.len();
    let changed = char::from(change & 0x7f).to_string();
    if token[at..=at] != changed {
        token.replace_range(at..=at, &changed);
        assert!(JWT.verify(&token).is_none(), "{token} was changed at {at}");
    }
}

fn sign(header: &[u8], claims: &[u8]) -> String {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    let signed = [URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims)].join(".");
    let key = EncodingKey::from_secret(SECRET).expect("any bytes are a secret");
    let signature = jsonwebtoken::crypto::sign(signed.as_bytes(), &key, Algorithm::HS256).expect("a secret signs");
    format!("{signed}.{signature}")
}

/// A token of each kind, unsigned, signed, and with claims that are not accepted.
pub fn seeds() -> Vec<Vec<u8>> {
    let signed = |header: &str, claims: &str| {
        let length = u8::try_from(header.len()).expect("it is short");
        [&[1, length][..], header.as_bytes(), claims.as_bytes()].concat()
    };
    let header = r#"{"alg":"HS256","typ":"JWT"}"#;
    let claims = r#"{"username":"ann","revision":7,"exp":5000000000}"#;
    vec![
        b"\0eyJhbGciOiJub25lIn0.eyJ1c2VybmFtZSI6InJvb3QifQ.".to_vec(),
        b"\0letters.17".to_vec(),
        signed(header, claims),
        signed(r#"{"alg":"none"}"#, claims),
        signed(r#"{"alg":"HS512"}"#, claims),
        signed(header, r#"{"username":"ann","revision":7,"exp":1}"#),
        signed(header, r#"{"username":1,"revision":-7,"exp":5e9}"#),
        b"\x02\0\0\0\x07A\0\x09\x03ann".to_vec(),
    ]
}
