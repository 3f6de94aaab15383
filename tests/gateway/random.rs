//! Random bodies, most of them wrong in some way, beside a real etcd.
//!
//! A body is made from the fields of the route's request: values of the right type and of wrong ones, numbers in odd spellings,
//! fields twice, unknown fields. Some bodies are then changed byte by byte.

use std::fmt::Write;

use metastore::{
    frontend::gateway::{routes::ROUTES, schema::Methods},
    proto::DESCRIPTORS,
};
use prost_reflect::{Cardinality, DescriptorPool, FieldDescriptor, Kind, MessageDescriptor};

use crate::pair::Pair;

/// Routes whose answers depend on chance or on the storage, that may wait for long, or that do not exist here yet.
const LEFT_OUT: [&str; 15] = [
    // These list IDs that a server has chosen, for grants whose ID is 0.
    "/v3/lease/leases",
    "/v3/kv/lease/leases",
    // It depends on when a compaction is over.
    "/v3/maintenance/hashkv",
    // An action that does not exist ends an etcd.
    "/v3/maintenance/alarm",
    "/v3/watch",
    "/v3/lock/lock",
    "/v3/election/campaign",
    "/v3/election/observe",
    "/v3/cluster/member/add",
    "/v3/cluster/member/remove",
    "/v3/cluster/member/update",
    "/v3/maintenance/hash",
    "/v3/maintenance/snapshot",
    "/v3/maintenance/downgrade",
    "/v3/auth/enable",
];
const BODIES: usize = 1000;

/// Numbers that look random, from a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) >> 1).unwrap() % limit
    }

    fn one_in(&mut self, limit: usize) -> bool {
        self.below(limit) == 0
    }

    fn pick<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        choices[self.below(choices.len())]
    }

    fn space(&mut self) -> &'static str {
        self.pick(&["", "", "", " ", "\n", "\t\r\n"])
    }

    fn object(&mut self, message: &MessageDescriptor, depth: usize, out: &mut String) {
        out.push('{');
        let fields: Vec<_> = message.fields().collect();
        let mut is_first = true;
        for field in &fields {
            let times = if self.one_in(30) { 2 } else { usize::from(!self.one_in(3)) };
            for _ in 0..times {
                // A member of a oneof is most often alone.
                if field.containing_oneof().is_some() && !is_first && !self.one_in(4) {
                    continue;
                }
                self.member(&mut is_first, out);
                let name = if self.one_in(3) { field.json_name() } else { field.name() };
                write!(out, "\"{name}\"{}:{}", self.space(), self.space()).unwrap();
                self.value(field, depth, out);
            }
        }
        if self.one_in(6) {
            self.member(&mut is_first, out);
            let name = self.pick(&["unknown", "", "[a.b]", "@type", "Key", "é", "\\u0041", "kvs"]);
            write!(out, "\"{name}\":").unwrap();
            self.any(0, out);
        }
        out.push_str(self.space());
        out.push('}');
    }

    fn member(&mut self, is_first: &mut bool, out: &mut String) {
        if !std::mem::take(is_first) {
            out.push(',');
        }
        out.push_str(self.space());
    }

    fn value(&mut self, field: &FieldDescriptor, depth: usize, out: &mut String) {
        if self.one_in(12) {
            return self.any(depth, out);
        }
        if field.cardinality() != Cardinality::Repeated {
            return self.single(&field.kind(), depth, out);
        }
        out.push('[');
        for nth in 0..self.below(4) {
            out.push_str(if nth > 0 { "," } else { "" });
            out.push_str(self.space());
            if self.one_in(15) { self.any(depth, out) } else { self.single(&field.kind(), depth, out) }
        }
        out.push(']');
    }

    fn single(&mut self, kind: &Kind, depth: usize, out: &mut String) {
        match kind {
            Kind::Message(message) if depth < 4 => self.object(message, depth + 1, out),
            Kind::Message(_) => out.push_str("{}"),
            Kind::Bool => out.push_str(self.pick(&["true", "false", "true", "\"true\"", "0"])),
            Kind::String => out.push_str(self.pick(&[
                "\"a\"",
                "\"\"",
                "\"http://127.0.0.1:9\"",
                "\"r\\n\\u00e9\"",
                "\"r\"",
                "\"root\"",
            ])),
            Kind::Bytes => out.push_str(self.pick(&[
                "\"Zm9v\"",
                "\"Zm8=\"",
                "\"Zm8\"",
                "\"\"",
                "\"AA==\"",
                "\"_-8=\"",
                "\"-_8\"",
                "\"+/8=\"",
                "\"Zg=\"",
                "\"Zg===\"",
                "\"Z\"",
                "\"Zm9v\\n\"",
                "\"+_8=\"",
                "\"Zh==\"",
                "\"Zm9v\\u003d\"",
            ])),
            Kind::Enum(values) => {
                let names: Vec<String> = values.values().map(|value| format!("\"{}\"", value.name())).collect();
                let mut choices: Vec<&str> = names.iter().map(String::as_str).collect();
                choices.extend(["0", "1", "2", "9", "-1", "1e0", "\"1\"", "\"none\"", "2147483648"]);
                out.push_str(self.pick(&choices));
            }
            _ => out.push_str(self.pick(&[
                "0",
                "1",
                "\"1\"",
                "2",
                "3",
                "\"7\"",
                "7",
                "100",
                "\"100\"",
                "-1",
                "\"-1\"",
                "1e0",
                "\"1e1\"",
                "10.0",
                "1.5",
                "-0",
                "1e30",
                "9223372036854775807",
                "\"9223372036854775807\"",
                "9223372036854775808",
                "18446744073709551616",
                "\" 1\"",
                "\"1 2\"",
                "\"\"",
                "\"0x1\"",
                "\"01\"",
                "4294967296",
                "100e-2",
                "\"1e,\"",
                "\"nul\"",
            ])),
        }
    }

    /// A value of any type.
    fn any(&mut self, depth: usize, out: &mut String) {
        match self.below(9) {
            0 if depth < 4 => {
                out.push('[');
                for nth in 0..self.below(3) {
                    out.push_str(if nth > 0 { "," } else { "" });
                    self.any(depth + 1, out);
                }
                out.push(']');
            }
            1 if depth < 4 => {
                out.push_str("{\"a\":");
                self.any(depth + 1, out);
                out.push('}');
            }
            _ => out.push_str(self.pick(&[
                "null",
                "null",
                "true",
                "false",
                "0",
                "-1.5e3",
                "\"\"",
                "\"x\"",
                "[]",
                "{}",
                "\"\\ud83d\\ude00\"",
                "\"\\ud800\"",
                "\"\\u0000\"",
                "\"é<&>\"",
            ])),
        }
    }

    /// Changes some bytes.
    fn damage(&mut self, body: &mut Vec<u8>) {
        for _ in 0..=self.below(3) {
            let place = self.below(body.len() + 1);
            let byte = if self.one_in(6) {
                u8::try_from(self.below(256)).unwrap()
            } else {
                self.pick(&["{", "}", "[", "]", ",", ":", "\"", "\\", "0", "e", ".", "-", "n", "\n", " ", "'", "\u{1}"])
                    .as_bytes()[0]
            };
            match self.below(4) {
                0 => body.truncate(place),
                1 if place < body.len() => {
                    body.remove(place);
                }
                2 if place < body.len() => body[place] = byte,
                _ => body.insert(place, byte),
            }
        }
    }
}

#[test]
fn a_thousand_random_bodies_are_answered_as_by_etcd() {
    let seed = std::env::var("METASTORE_SEED").map_or_else(
        |_| std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs(),
        |seed| seed.parse().expect("METASTORE_SEED is a number"),
    );
    eprintln!("METASTORE_SEED={seed}");
    let Some(mut pair) = Pair::start(&[]) else { return };
    let (methods, pool) = (Methods::new(DESCRIPTORS), DescriptorPool::decode(DESCRIPTORS).unwrap());
    let routes: Vec<_> = ROUTES.iter().filter(|(path, _)| !LEFT_OUT.contains(path)).collect();
    let mut random = Random(seed);
    let mut statuses = std::collections::BTreeMap::new();
    for _ in 0..BODIES {
        // The routes of keys are as likely as all others together.
        let (path, method) = routes[if random.one_in(2) { random.below(5) } else { random.below(routes.len()) }];
        let request = pool.get_message_by_name(&methods.get(method).unwrap().request).unwrap();
        let mut body = String::new();
        random.object(&request, 0, &mut body);
        let mut body = body.into_bytes();
        if random.one_in(3) {
            random.damage(&mut body);
        }
        if *path == "/v3/lease/grant" && !body.windows(4).any(|part| part == b"\"ID\"") {
            continue; // The server would choose an ID.
        }
        let masked: &[&str] = if *path == "/v3/lease/grant" { &["ID"] } else { &[] };
        let answer = pair.post_masked(path, &[], &body, masked);
        *statuses.entry(answer.status).or_insert(0) += 1;
    }
    eprintln!("answers by status: {statuses:?}");
    assert!(statuses[&200] > BODIES / 10 && statuses[&400] > BODIES / 10, "{statuses:?}");
    pair.finish();
}
