//! The JSON bodies of requests between members, in etcd's form: integers are numbers, and most zero or empty fields are omitted.

use serde_json::{Map, Value};

use crate::{error::Error, proto::etcdserverpb::Member};

/// The versions of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versions {
    /// Of the server program.
    pub server: String,
    /// Of the cluster; `not_decided` at first.
    pub cluster: String,
    /// Of the stored data.
    pub storage: String,
}

/// The hash of a member's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerHash {
    pub hash: u32,
    /// The revision at which it was computed.
    pub hash_revision: i64,
    /// The compact revision at that time.
    pub compact_revision: i64,
    /// The member's newest revision.
    pub head: i64,
}

/// The text of an error in responses between members: without the prefix `etcdserver: `.
#[must_use]
pub fn text_without_prefix(error: &Error) -> String {
    let text = error.to_string();
    text.strip_prefix("etcdserver: ").map(str::to_owned).unwrap_or(text)
}

/// Writes a list of members.
#[must_use]
pub fn write_members<'a>(members: impl IntoIterator<Item = &'a Member>) -> String {
    let members: Vec<String> = members.into_iter().map(write_member).collect();
    format!("[{}]\n", members.join(","))
}

fn write_member(member: &Member) -> String {
    let texts = |texts: &[String]| Value::from(texts).to_string();
    let mut fields = vec![format!(r#""id":{}"#, member.id), format!(r#""peerURLs":{}"#, texts(&member.peer_ur_ls))];
    if member.is_learner {
        fields.push(r#""isLearner":true"#.to_owned());
    }
    if !member.name.is_empty() {
        fields.push(format!(r#""name":{}"#, Value::from(member.name.as_str())));
    }
    if !member.client_ur_ls.is_empty() {
        fields.push(format!(r#""clientURLs":{}"#, texts(&member.client_ur_ls)));
    }
    format!("{{{}}}", fields.join(","))
}

/// Reads a list of members.
pub fn read_members(bytes: &[u8]) -> Result<Vec<Member>, String> {
    let list: Vec<Map<String, Value>> =
        serde_json::from_slice(bytes).map_err(|error| format!("not a member list: {error}"))?;
    list.iter().map(read_member).collect()
}

fn read_member(fields: &Map<String, Value>) -> Result<Member, String> {
    let texts = |name: &str| -> Vec<String> {
        let texts = fields.get(name).and_then(Value::as_array).into_iter().flatten();
        texts.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    Ok(Member {
        id: fields.get("id").and_then(Value::as_u64).ok_or("a member has no ID")?,
        name: fields.get("name").and_then(Value::as_str).unwrap_or_default().to_owned(),
        peer_ur_ls: texts("peerURLs"),
        client_ur_ls: texts("clientURLs"),
        is_learner: fields.get("isLearner").and_then(Value::as_bool).unwrap_or_default(),
    })
}

impl Versions {
    #[must_use]
    pub fn write(&self) -> String {
        let [server, cluster, storage] =
            [&self.server, &self.cluster, &self.storage].map(|text| Value::from(text.as_str()));
        format!(r#"{{"etcdserver":{server},"etcdcluster":{cluster},"storage":{storage}}}"#)
    }

    pub(super) fn read(bytes: &[u8]) -> Result<Self, String> {
        let fields = object(bytes)?;
        let text = |name: &str| fields.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        Ok(Self { server: text("etcdserver"), cluster: text("etcdcluster"), storage: text("storage") })
    }
}

/// Writes a request for a hash.
#[must_use]
pub fn hash_request(revision: i64) -> Vec<u8> {
    if revision == 0 { b"{}".to_vec() } else { format!(r#"{{"revision":{revision}}}"#).into_bytes() }
}

/// Reads a request for a hash: the revision.
pub fn read_hash_request(bytes: &[u8]) -> Result<i64, String> {
    match object(bytes)?.get("revision") {
        None | Some(Value::Null) => Ok(0),
        Some(revision) => revision.as_i64().ok_or_else(|| format!("{revision} is not a revision")),
    }
}

impl PeerHash {
    #[must_use]
    pub fn write(&self) -> String {
        let field = |name: &str, number: i64| (number != 0).then(|| format!(r#""{name}":{number}"#));
        let header = format!(r#""header":{{{}}}"#, field("revision", self.head).unwrap_or_default());
        let fields = [
            field("hash", i64::from(self.hash)),
            field("compact_revision", self.compact_revision),
            field("hash_revision", self.hash_revision),
        ];
        let fields: Vec<String> = std::iter::once(header).chain(fields.into_iter().flatten()).collect();
        format!("{{{}}}", fields.join(","))
    }

    pub(super) fn read(bytes: &[u8]) -> Result<Self, String> {
        let fields = object(bytes)?;
        let number = |fields: &Map<String, Value>, name: &str| fields.get(name).and_then(Value::as_i64).unwrap_or(0);
        let header = fields.get("header").and_then(Value::as_object);
        Ok(Self {
            hash: u32::try_from(number(&fields, "hash")).map_err(|_| "the hash has more than 32 bits")?,
            hash_revision: number(&fields, "hash_revision"),
            compact_revision: number(&fields, "compact_revision"),
            head: header.map_or(0, |header| number(header, "revision")),
        })
    }
}

fn object(bytes: &[u8]) -> Result<Map<String, Value>, String> {
    serde_json::from_slice(bytes).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_list_has_etcds_form_and_is_read_as_it_was_written() {
        let unstarted = Member { id: u64::MAX, peer_ur_ls: vec!["http://a:1".into()], ..Member::default() };
        let started = Member {
            id: 7,
            name: "a \"b\"".into(),
            peer_ur_ls: vec!["http://b:1".into(), "http://b:2".into()],
            client_ur_ls: vec!["http://b:9".into()],
            is_learner: true,
        };
        let text = write_members([&started, &unstarted]);
        assert_eq!(
            text,
            "[{\"id\":7,\"peerURLs\":[\"http://b:1\",\"http://b:2\"],\"isLearner\":true,\"name\":\"a \\\"b\\\"\",\
             \"clientURLs\":[\"http://b:9\"]},{\"id\":18446744073709551615,\"peerURLs\":[\"http://a:1\"]}]\n"
        );
        assert_eq!(read_members(text.as_bytes()), Ok(vec![started, unstarted]));
        assert_eq!(read_members(b"[{\"id\":1,\"peerURLs\":null}]").unwrap()[0].peer_ur_ls, [] as [&str; 0]);
        assert!(read_members(b"[{}]").is_err() && read_members(b"<html>").is_err());
    }

    #[test]
    fn versions_are_read_as_they_were_written() {
        let versions = Versions { server: "3.7.3".into(), cluster: "not_decided".into(), storage: "3.7.0".into() };
        let text = versions.write();
        assert_eq!(text, r#"{"etcdserver":"3.7.3","etcdcluster":"not_decided","storage":"3.7.0"}"#);
        assert_eq!(Versions::read(text.as_bytes()), Ok(versions));
    }

    #[test]
    fn a_hash_is_read_as_it_was_written_without_zeros() {
        let hash = PeerHash { hash: u32::MAX, hash_revision: 5, compact_revision: -1, head: 7 };
        let text = hash.write();
        assert_eq!(text, r#"{"header":{"revision":7},"hash":4294967295,"compact_revision":-1,"hash_revision":5}"#);
        assert_eq!(PeerHash::read(text.as_bytes()), Ok(hash));
        let nothing = PeerHash { hash: 0, hash_revision: 0, compact_revision: 0, head: 0 };
        assert_eq!(nothing.write(), r#"{"header":{}}"#);
        assert_eq!(PeerHash::read(b"{\"header\":{}}"), Ok(nothing));
        assert!(PeerHash::read(b"{\"hash\":4294967296}").is_err());
    }

    #[test]
    fn a_hash_request_is_read_as_it_was_written() {
        for revision in [0, 1, -3, i64::MAX] {
            assert_eq!(read_hash_request(&hash_request(revision)), Ok(revision));
        }
        assert!(read_hash_request(b"").is_err() && read_hash_request(b"{\"revision\":\"x\"}").is_err());
    }
}
