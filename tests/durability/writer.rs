//! A writer with keys of its own, who remembers what he was promised.
//!
//! He has one transaction under way at a time, writes values that nobody wrote before, and often two keys at once. So after
//! a crash there are exactly two states that his keys may be in: that of his last acknowledged transaction, and that of the
//! one that was under way. Anything else is a broken promise: something lost, something half done, something brought back.

use std::collections::BTreeMap;

use bytes::Bytes;
use metastore::proto::{
    etcdserverpb::{DeleteRangeRequest, PutRequest, RequestOp, TxnRequest, request_op::Request},
    mvccpb::KeyValue,
};
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

/// Few keys, so that each is written, deleted and written again within a round.
const KEYS: usize = 8;
const DELETIONS_PERCENT: u32 = 15;
const LONG_VALUES_PERCENT: u32 = 5;
const LONG_VALUE_BYTES: usize = 16 << 10;

/// What a key holds: a value, and when it was written.
type State = BTreeMap<Bytes, (Bytes, i64)>;

/// One writer.
pub struct Writer {
    name: usize,
    dice: StdRng,
    serial: u64,
    /// What was acknowledged.
    state: State,
    /// The transaction under way: each key with its value, or none to delete it.
    under_way: Option<Vec<(Bytes, Option<Bytes>)>>,
    pub acknowledged: u64,
}

/// What became of a transaction that nobody heard of any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    NoneUnderWay,
    Done,
    NotDone,
}

impl Writer {
    pub fn new(name: usize, seed: u64) -> Self {
        let dice = StdRng::seed_from_u64(seed ^ (name as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Self { name, dice, serial: 0, state: State::new(), under_way: None, acknowledged: 0 }
    }

    /// Which keys are his: from the first, up to but without the second.
    pub fn range(&self) -> (Bytes, Bytes) {
        (Bytes::from(format!("w{:04}/", self.name)), Bytes::from(format!("w{:04}0", self.name)))
    }

    /// The next thing that he wants.
    pub fn next(&mut self) -> TxnRequest {
        assert!(self.under_way.is_none(), "one transaction at a time");
        self.serial += 1;
        let (first, second) = (self.dice.random_range(0..KEYS), self.dice.random_range(0..KEYS));
        let mut keys = vec![self.key(first)];
        if first != second {
            keys.push(self.key(second));
        }
        let deletes =
            self.dice.random_ratio(DELETIONS_PERCENT, 100) && keys.iter().any(|key| self.state.contains_key(key));
        let value = self.value();
        let changes: Vec<_> = keys.into_iter().map(|key| (key, (!deletes).then(|| value.clone()))).collect();
        let success = changes.iter().map(|(key, value)| op(key, value.as_ref())).collect();
        self.under_way = Some(changes);
        TxnRequest { success, ..TxnRequest::default() }
    }

    /// He was told that it is done.
    pub fn acknowledge(&mut self, revision: i64) {
        let changes = self.under_way.take().expect("only what is under way is acknowledged");
        self.acknowledged += 1;
        self.state = after(&self.state, &changes, revision);
    }

    /// He looks at his keys after a crash.
    pub fn look(&mut self, found: &[KeyValue]) -> Fate {
        let found: State =
            found.iter().map(|found| (found.key.clone(), (found.value.clone(), found.mod_revision))).collect();
        let Some(changes) = self.under_way.take() else {
            assert_same(self.name, &found, &self.state);
            return Fate::NoneUnderWay;
        };
        // When it was done he was not told; all its keys must say the same.
        let written = changes.iter().filter(|(_, value)| value.is_some());
        let revision = written.filter_map(|(key, _)| found.get(key)).map(|(_, revision)| *revision).max().unwrap_or(0);
        let done = after(&self.state, &changes, revision);
        let fate = if found == done && found != self.state { Fate::Done } else { Fate::NotDone };
        if fate == Fate::NotDone {
            assert_same(self.name, &found, &self.state);
        }
        self.state = found;
        fate
    }

    fn key(&self, nth: usize) -> Bytes {
        Bytes::from(format!("w{:04}/{nth}", self.name))
    }

    /// A value that was never written before, and that is of no use to a compression.
    fn value(&mut self) -> Bytes {
        let long = self.dice.random_ratio(LONG_VALUES_PERCENT, 100);
        let len = if long { self.dice.random_range(0..LONG_VALUE_BYTES) } else { self.dice.random_range(0..256) };
        let mut value = format!("{}/{} ", self.name, self.serial).into_bytes();
        let start = value.len();
        value.resize(start + len, 0);
        self.dice.fill_bytes(&mut value[start..]);
        value.into()
    }
}

fn op(key: &Bytes, value: Option<&Bytes>) -> RequestOp {
    let key = key.clone();
    let request = match value {
        Some(value) => Request::RequestPut(PutRequest { key, value: value.clone(), ..PutRequest::default() }),
        None => Request::RequestDeleteRange(DeleteRangeRequest { key, ..DeleteRangeRequest::default() }),
    };
    RequestOp { request: Some(request) }
}

fn after(state: &State, changes: &[(Bytes, Option<Bytes>)], revision: i64) -> State {
    let mut state = state.clone();
    for (key, value) in changes {
        match value {
            Some(value) => state.insert(key.clone(), (value.clone(), revision)),
            None => state.remove(key),
        };
    }
    state
}

fn assert_same(name: usize, found: &State, expected: &State) {
    let brief = |state: &State| {
        let brief = |(key, (value, revision)): (&Bytes, &(Bytes, i64))| {
            let serial = value.split(|byte| *byte == b' ').next().unwrap_or_default();
            format!("{} = {} @{revision}", String::from_utf8_lossy(key), String::from_utf8_lossy(serial))
        };
        state.iter().map(brief).collect::<Vec<_>>().join(", ")
    };
    assert!(found == expected, "writer {name} finds\n{}\nbut was promised\n{}", brief(found), brief(expected));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(writer: &Writer) -> Vec<KeyValue> {
        let key_value = |(key, (value, revision)): (&Bytes, &(Bytes, i64))| KeyValue {
            key: key.clone(),
            value: value.clone(),
            mod_revision: *revision,
            ..KeyValue::default()
        };
        writer.state.iter().map(key_value).collect()
    }

    /// A writer with a transaction of two puts under way.
    fn writer_of_two() -> Writer {
        let mut writer = Writer::new(0, 1);
        loop {
            let txn = writer.next();
            if writer.serial > 20 && txn.success.len() == 2 && writer.under_way.as_ref().unwrap()[0].1.is_some() {
                return writer;
            }
            writer.acknowledge(i64::try_from(writer.serial).unwrap());
        }
    }

    #[test]
    fn both_or_neither_is_in_order() {
        let mut writer = writer_of_two();
        let neither = found(&writer);
        assert_eq!(writer.look(&neither), Fate::NotDone);
        let mut writer = writer_of_two();
        writer.state = after(&writer.state, writer.under_way.as_ref().unwrap(), 99);
        let both = found(&writer);
        assert_eq!(writer_of_two().look(&both), Fate::Done);
    }

    #[test]
    #[should_panic(expected = "but was promised")]
    fn half_a_transaction_is_not() {
        let mut writer = writer_of_two();
        let half = after(&writer.state, &writer.under_way.as_ref().unwrap()[..1], 99);
        let whole = std::mem::replace(&mut writer.state, half);
        let half = found(&writer);
        writer.state = whole;
        writer.look(&half);
    }
}
