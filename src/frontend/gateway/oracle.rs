//! The codec beside prost-reflect's, for random messages of all routes.

use proptest::prelude::*;
use prost::Message;
use prost_reflect::{
    Cardinality, DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, SerializeOptions, Value,
};

use super::{
    decode::{DecodeError, decode},
    encode::{encode_body, encode_line},
    routes::ROUTES,
    schema::{Methods, Schema},
};
use crate::proto::DESCRIPTORS;

/// Numbers that look random, from a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn bytes(&mut self) -> Vec<u8> {
        (0..self.below(9)).map(|_| self.next().to_le_bytes()[0]).collect()
    }

    fn text(&mut self) -> String {
        const PARTS: [&str; 12] = ["a", "<b>&", "\"", "\\", "\n", "\u{1}", "é", "\u{2028}", "😀", "", "/", "\u{7f}"];
        (0..self.below(5)).map(|_| PARTS[usize::try_from(self.below(12)).unwrap()]).collect()
    }

    /// Small numbers and the largest are more likely.
    fn number(&mut self) -> u64 {
        match self.below(4) {
            0 => self.below(4),
            1 => u64::MAX - self.below(2),
            2 => i64::MAX.cast_unsigned() + self.below(2),
            _ => self.next(),
        }
    }

    #[allow(clippy::cast_possible_truncation, reason = "any number will do")]
    fn value(&mut self, kind: &Kind, depth: u32) -> Value {
        match kind {
            Kind::Bool => Value::Bool(self.below(2) == 1),
            Kind::Int32 => Value::I32(self.number() as i32),
            Kind::Int64 => Value::I64(self.number().cast_signed()),
            Kind::Uint32 => Value::U32(self.number() as u32),
            Kind::Uint64 => Value::U64(self.number()),
            Kind::String => Value::String(self.text()),
            Kind::Bytes => Value::Bytes(self.bytes().into()),
            Kind::Enum(_) => Value::EnumNumber(self.below(5) as i32),
            Kind::Message(message) => Value::Message(self.message(message, depth + 1)),
            other => panic!("no message of a route has a {other:?}"),
        }
    }

    fn message(&mut self, descriptor: &MessageDescriptor, depth: u32) -> DynamicMessage {
        let mut message = DynamicMessage::new(descriptor.clone());
        for field in descriptor.fields().filter(|field| depth < 5 || !matches!(field.kind(), Kind::Message(_))) {
            match self.below(3) {
                0 => (),
                _ if field.cardinality() == Cardinality::Repeated => {
                    let values = (0..self.below(4)).map(|_| self.value(&field.kind(), depth)).collect();
                    message.set_field(&field, Value::List(values));
                }
                _ => {
                    let value = self.value(&field.kind(), depth);
                    message.set_field(&field, value);
                }
            }
        }
        message
    }

    /// The message as JSON, spelled in one of the ways that clients may choose.
    fn json(&mut self, message: &DynamicMessage, out: &mut String) {
        out.push('{');
        let fields: Vec<(FieldDescriptor, Value)> =
            message.fields().map(|(field, value)| (field, value.clone())).collect();
        for (nth, (field, value)) in fields.iter().enumerate() {
            let name = if self.below(2) == 0 { field.name() } else { field.json_name() };
            out.push_str(&format!("{}\"{name}\" :{}", if nth > 0 { "," } else { "" }, self.space()));
            self.json_value(value, &field.kind(), out);
        }
        if self.below(4) == 0 {
            let comma = if fields.is_empty() { "" } else { "," };
            out.push_str(&format!("{comma}\"unknown\":[1.5e-3,{{\"a\":null}},\"\\u00e9]\"]"));
        }
        out.push('}');
    }

    fn space(&mut self) -> &'static str {
        ["", " ", "\n\t", "\r\n"][usize::try_from(self.below(4)).unwrap()]
    }

    fn json_value(&mut self, value: &Value, kind: &Kind, out: &mut String) {
        match (value, kind) {
            (Value::List(values), _) => {
                out.push('[');
                for (nth, value) in values.iter().enumerate() {
                    out.push_str(if nth > 0 { ", " } else { "" });
                    self.json_value(value, kind, out);
                }
                out.push(']');
            }
            (Value::Message(message), _) => self.json(message, out),
            (Value::EnumNumber(number), Kind::Enum(values)) if self.below(2) == 0 => match values.get_value(*number) {
                Some(value) => out.push_str(&format!("{:?}", value.name())),
                None => out.push_str(&number.to_string()),
            },
            (Value::String(text), _) => {
                let spelled = text.chars().map(|char| match self.below(3) {
                    0 => char.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04X}")).collect(),
                    _ => {
                        let quoted = serde_json::to_string(&char).unwrap();
                        quoted[1..quoted.len() - 1].to_owned()
                    }
                });
                let spelled: String = spelled.collect();
                out.push_str(&format!("\"{spelled}\""));
            }
            (Value::Bytes(bytes), _) => {
                use base64::{Engine, engine::general_purpose as engines};
                let text = match self.below(4) {
                    0 => engines::STANDARD.encode(bytes),
                    1 => engines::STANDARD_NO_PAD.encode(bytes),
                    2 => engines::URL_SAFE.encode(bytes),
                    _ => engines::URL_SAFE_NO_PAD.encode(bytes),
                };
                out.push_str(&format!("\"{text}\""));
            }
            (Value::Bool(value), _) => out.push_str(&value.to_string()),
            (Value::EnumNumber(number), _) => out.push_str(&number.to_string()),
            (Value::I32(number), _) => self.json_number(number.to_string(), out),
            (Value::I64(number), _) => self.json_number(number.to_string(), out),
            (Value::U32(number), _) => self.json_number(number.to_string(), out),
            (Value::U64(number), _) => self.json_number(number.to_string(), out),
            (other, _) => panic!("no message of a route has a {other:?}"),
        }
    }

    fn json_number(&mut self, number: String, out: &mut String) {
        let number = match self.below(3) {
            0 => format!("{number}.0e0"),
            _ => number,
        };
        out.push_str(&if self.below(2) == 0 { format!("\"{number}\"") } else { number });
    }
}

/// Requests, responses, or both, of all routes.
fn types() -> (Schema, DescriptorPool, Vec<String>) {
    let declared = Methods::new(DESCRIPTORS);
    let of_route = |(_, path): &(&str, &str)| {
        let types = declared.get(path).unwrap();
        [types.request.clone(), types.response.clone()]
    };
    let names: Vec<String> = ROUTES.iter().flat_map(of_route).collect();
    (Schema::new(DESCRIPTORS, &names), DescriptorPool::decode(DESCRIPTORS).unwrap(), names)
}

/// The message as prost-reflect writes it.
fn expected(message: &DynamicMessage) -> String {
    let mut out = Vec::new();
    let options = SerializeOptions::new().use_proto_field_name(true);
    message.serialize_with_options(&mut serde_json::Serializer::new(&mut out), &options).unwrap();
    String::from_utf8(out).unwrap()
}

proptest! {
    #[test]
    fn messages_are_encoded_as_prost_reflect_encodes_them(seed: u64) {
        let (schema, pool, names) = types();
        let mut random = Random(seed);
        for name in names {
            let message = random.message(&pool.get_message_by_name(&name).unwrap(), 0);
            let (id, wire) = (schema.find(&name).unwrap(), message.encode_to_vec());
            let encoded = encode_body(&schema, id, &wire, &mut |_| true).unwrap();
            prop_assert_eq!(&encoded, &expected(&message), "{}", name);
            let line = encode_line(&schema, id, &wire, &mut |_| true).unwrap();
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            prop_assert_eq!(&line["result"], &serde_json::from_str::<serde_json::Value>(&encoded).unwrap());
        }
    }

    #[test]
    fn messages_are_decoded_however_they_are_spelled(seed: u64) {
        let (schema, pool, names) = types();
        let mut random = Random(seed);
        for name in names {
            let descriptor = pool.get_message_by_name(&name).unwrap();
            let message = random.message(&descriptor, 0);
            let mut json = String::new();
            random.json(&message, &mut json);
            let decoded = decode(&schema, schema.find(&name).unwrap(), json.as_bytes(), usize::MAX);
            let decoded = decoded.map(|wire| DynamicMessage::decode(descriptor, wire.as_slice()).unwrap());
            // Encoded again, because a message also compares what it was explicitly set to, even if that is its default.
            let decoded = decoded.map(|decoded| decoded.encode_to_vec());
            prop_assert_eq!(decoded, Ok(message.encode_to_vec()), "{}: {}", name, json);
        }
    }

    /// Values that have passed the scanner never make the decoder panic, and what it makes of them is a message.
    #[test]
    fn any_value_is_decoded_or_refused(seed: u64, edits in prop::collection::vec((any::<u16>(), any::<u8>()), 0..6)) {
        let (schema, pool, names) = types();
        let mut random = Random(seed);
        for name in names {
            let descriptor = pool.get_message_by_name(&name).unwrap();
            let mut json = String::new();
            let message = random.message(&descriptor, 0);
            random.json(&message, &mut json);
            let mut json = json.into_bytes();
            for (place, byte) in &edits {
                let place = usize::from(*place) % json.len();
                json[place] = *byte;
            }
            let mut values = super::values::Values::new(usize::MAX);
            let Ok(Some(value)) = values.push(&mut json.into()) else { continue };
            match decode(&schema, schema.find(&name).unwrap(), &value, usize::MAX) {
                Ok(wire) => drop(DynamicMessage::decode(descriptor, wire.as_slice()).unwrap()),
                Err(DecodeError::Invalid(text)) => prop_assert!(text.starts_with("proto: "), "{}", text),
                Err(DecodeError::TooLarge) => prop_assert!(false, "there is no limit"),
            }
        }
    }
}

/// The texts are those that a real etcd gave.
#[test]
fn errors_have_protojsons_texts() {
    let (schema, ..) = types();
    let cases = [
        ("RangeRequest", "null", "syntax error (line 1:1): unexpected token null"),
        ("RangeRequest", "[]", "syntax error (line 1:1): unexpected token ["),
        ("RangeRequest", "\"x\"", "syntax error (line 1:1): unexpected token \"x\""),
        ("RangeRequest", "{\"key\":5}", "(line 1:8): invalid value for bytes field key: 5"),
        ("RangeRequest", "{\"key\":{}}", "(line 1:8): invalid value for bytes field key: {"),
        ("RangeRequest", "{\"key\":\"Zg=\"}", "(line 1:8): invalid value for bytes field key: \"Zg=\""),
        ("RangeRequest", "{\"key\":\n 5}", "(line 2:2): invalid value for bytes field key: 5"),
        ("RangeRequest", "{\"é\":1,\"key\":5}", "(line 1:14): invalid value for bytes field key: 5"),
        ("RangeRequest", "{\"limit\":1.5}", "(line 1:10): invalid value for int64 field limit: 1.5"),
        ("RangeRequest", "{\"sort_order\":true}", "(line 1:15): invalid value for enum field sortOrder: true"),
        ("RangeRequest", "{\"key\":\"\",\"key\":\"\"}", "(line 1:11): duplicate field \"key\""),
        ("RangeRequest", "{\"range_end\":\"\",\"rangeEnd\":\"\"}", "(line 1:17): duplicate field \"rangeEnd\""),
        ("RangeRequest", "{\"key\":\"\\ud800\"}", "unexpected EOF"),
        (
            "RangeRequest",
            "{\"x\":\"\\ud800\",\"key\":\"Zm9v\"}",
            "syntax error (line 1:6): invalid escape code \"\\\",\\\"key\" in string",
        ),
        ("TxnRequest", "{\"compare\":[null]}", "syntax error (line 1:13): unexpected token null"),
        ("TxnRequest", "{\"compare\":{}}", "syntax error (line 1:12): unexpected token {"),
        (
            "TxnRequest",
            "{\"compare\":[{\"version\":0,\"value\":\"\"}]}",
            "(line 1:26): error parsing \"value\", oneof etcdserverpb.Compare.target_union is already set",
        ),
        ("MemberAddRequest", "{\"peerURLs\":[null]}", "(line 1:14): invalid value for string field peerURLs: null"),
    ];
    for (name, json, text) in cases {
        let id = schema.find(&format!("etcdserverpb.{name}")).unwrap();
        let expected = Err(DecodeError::Invalid(format!("proto: {text}")));
        assert_eq!(decode(&schema, id, json.as_bytes(), 1000), expected, "{json}");
    }
    let id = schema.find("etcdserverpb.RangeRequest").unwrap();
    let invalid = decode(&schema, id, b"{\"x\":\"\xff\"}", 1000);
    assert_eq!(
        invalid,
        Err(DecodeError::Invalid("proto: syntax error (line 1:6): invalid UTF-8 in string".to_owned()))
    );
}

/// Ten thousand levels, as deep as the scanner lets a value be, with much inside.
#[test]
fn deep_messages_cost_neither_stack_nor_copies() {
    let (schema, ..) = types();
    let id = schema.find("etcdserverpb.TxnRequest").unwrap();
    let (depth, value) = (3333, "A".repeat(4 << 20));
    let inner = format!("{{\"success\":[{{\"request_put\":{{\"value\":\"{value}\"}}}}]}}");
    let json = "{\"success\":[{\"request_txn\":".repeat(depth) + &inner + &"}]}".repeat(depth);
    let wire = decode(&schema, id, json.as_bytes(), usize::MAX).unwrap();
    let mut rest = wire.as_slice();
    for level in 0..=depth {
        // An operation, and in it the next transaction.
        for field in [2, if level == depth { 2 } else { 4 }] {
            let (number, _) = prost::encoding::decode_key(&mut rest).unwrap();
            let length = prost::encoding::decode_varint(&mut rest).unwrap();
            assert_eq!((number, usize::try_from(length).unwrap()), (field, rest.len()), "level {level}");
        }
    }
    let many = format!("{{\"success\":[{}{{}}]}}", "{},".repeat(1000));
    assert_eq!(decode(&schema, id, many.as_bytes(), 2000), Err(DecodeError::TooLarge));
}
