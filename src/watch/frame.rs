//! The encoding of events: each event is encoded once, and the result is shared by all watches that receive it.
//!
//! A frame is field 11 of a `WatchResponse`, including tag and length, so a response is its other fields followed by frames. An
//! event has two frames, with and without the previous value; each is encoded when it is first needed.

use bytes::Bytes;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};

use crate::{
    error::Halt,
    mvcc::{Event, Reader, read},
};

const EVENTS_FIELD: u32 = 11;
const TYPE_FIELD: u32 = 1;
const KV_FIELD: u32 = 2;
const PREV_KV_FIELD: u32 = 3;
const MOD_REVISION_FIELD: u32 = 3;
const DELETE: u64 = 1;

/// An event, and those of its frames that have been encoded.
pub struct Framer<'a> {
    event: &'a Event,
    plain: Option<Bytes>,
    full: Option<Bytes>,
}

impl<'a> Framer<'a> {
    #[must_use]
    pub fn new(event: &'a Event) -> Self {
        Self { event, plain: None, full: None }
    }

    #[must_use]
    pub fn event(&self) -> &'a Event {
        self.event
    }

    /// The frame; with the previous value if that is requested and not compacted.
    pub fn frame(&mut self, with_previous: bool, reader: &Reader) -> Result<Bytes, Halt> {
        let with_previous = with_previous && self.event.previous.is_some();
        let known = if with_previous { &mut self.full } else { &mut self.plain };
        if let Some(frame) = known {
            return Ok(frame.clone());
        }
        Ok(known.insert(encode(self.event, with_previous, reader)?).clone())
    }
}

/// Encodes the frame of an event; with the previous value if that is requested and not compacted.
pub fn encode(event: &Event, with_previous: bool, reader: &Reader) -> Result<Bytes, Halt> {
    let previous = if with_previous { previous(event, reader)? } else { None };
    Ok(write(event, previous.as_ref()))
}

/// The record that an event replaced; None if the event created the key, or if the previous record is compacted. It counts as
/// compacted if the revision before the event cannot be read any more, even if the record still exists.
fn previous(event: &Event, reader: &Reader) -> Result<Option<Bytes>, Halt> {
    let Some(revision) = event.previous else { return Ok(None) };
    if event.revision.main <= reader.compacted() {
        return Ok(None);
    }
    if !event.deletion && read::decode(event.record.clone())?.create_revision == event.revision.main {
        return Ok(None); // One transaction deleted the key and created it again.
    }
    reader.record(revision)
}

fn write(event: &Event, previous: Option<&Bytes>) -> Bytes {
    // The record of a deletion contains only the key; watchers also receive its revision.
    let main = event.revision.main.cast_unsigned();
    let revision_len = if event.deletion { key_len(MOD_REVISION_FIELD) + encoded_len_varint(main) } else { 0 };
    let kv_len = event.record.len() + revision_len;
    let kind_len = if event.deletion { key_len(TYPE_FIELD) + 1 } else { 0 };
    let body_len = kind_len + field_len(KV_FIELD, kv_len) + previous.map_or(0, |kv| field_len(PREV_KV_FIELD, kv.len()));
    let mut out = Vec::with_capacity(field_len(EVENTS_FIELD, body_len));
    open(EVENTS_FIELD, body_len, &mut out);
    if event.deletion {
        encode_key(TYPE_FIELD, WireType::Varint, &mut out);
        encode_varint(DELETE, &mut out);
    }
    open(KV_FIELD, kv_len, &mut out);
    out.extend_from_slice(&event.record);
    if event.deletion {
        encode_key(MOD_REVISION_FIELD, WireType::Varint, &mut out);
        encode_varint(main, &mut out);
    }
    if let Some(previous) = previous {
        open(PREV_KV_FIELD, previous.len(), &mut out);
        out.extend_from_slice(previous);
    }
    Bytes::from(out)
}

fn field_len(field: u32, len: usize) -> usize {
    key_len(field) + encoded_len_varint(len as u64) + len
}

fn open(field: u32, len: usize, out: &mut Vec<u8>) {
    encode_key(field, WireType::LengthDelimited, out);
    encode_varint(len as u64, out);
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::{
        mvcc::Revision,
        proto::{
            etcdserverpb::WatchResponse,
            mvccpb::{Event as Wire, KeyValue},
        },
    };

    fn check(deletion: bool, stored: &KeyValue, expected: KeyValue, previous: Option<KeyValue>) {
        let revision = Revision { main: 300, sub: 1 };
        let event = Event::of_record(revision, deletion, stored.encode_to_vec().into());
        let frame = write(&event, previous.as_ref().map(|kv| Bytes::from(kv.encode_to_vec())).as_ref());
        let wire = Wire { r#type: i32::from(deletion), kv: Some(expected), prev_kv: previous };
        assert_eq!(frame, WatchResponse { events: vec![wire], ..WatchResponse::default() }.encode_to_vec());
    }

    #[test]
    fn a_frame_is_what_protobuf_would_have_written() {
        let old = KeyValue { key: "k".into(), value: vec![b'o'; 200].into(), version: 1, ..KeyValue::default() };
        let new = KeyValue { mod_revision: 300, create_revision: 2, lease: 7, version: 2, ..old.clone() };
        check(false, &new, new.clone(), None);
        check(false, &new, new.clone(), Some(old.clone()));
        let tombstone = KeyValue { key: "k".into(), ..KeyValue::default() };
        let expected = KeyValue { mod_revision: 300, ..tombstone.clone() };
        check(true, &tombstone, expected.clone(), None);
        check(true, &tombstone, expected, Some(old));
    }
}
