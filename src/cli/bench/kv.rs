//! The unary workloads: put, get, list, compare-and-swap.

use std::{
    cell::RefCell,
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes, BytesMut};

use crate::proto::etcdserverpb::{
    Compare, PutRequest, RangeRequest, RangeResponse, RequestOp, TxnRequest, TxnResponse, compare, kv_client::KvClient,
    request_op, response_op,
};

use super::{
    connections::UnaryChannel,
    keys::{KeySpace, Random},
    measure::Failure,
};

/// An operation on keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    /// Put a random key.
    Put,
    /// Put the key with the number of the call.
    PutInOrder,
    /// Put the key at the position of the call in the shuffled order.
    PutShuffled,
    /// Put a random key; the value begins with the time at which the put was due.
    PutStamped,
    /// Get a random key.
    Get { serializable: bool },
    /// Get consecutive keys, starting at a random one.
    List(Listing),
    /// Compare-and-swap a random key.
    Swap,
}

/// The parameters of a call that lists keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Listing {
    /// Number of keys in the range.
    pub(super) keys: u64,
    /// Number of keys to return; the others are only counted.
    pub(super) limit: u64,
    pub(super) keys_only: bool,
    pub(super) serializable: bool,
}

/// The outcome of a call that was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    /// Compare-and-swap: another caller has changed the key first.
    Lost,
}

/// The last known modification revision of each key, shared by the callers of one worker.
pub(super) type Revisions = Rc<RefCell<Vec<i64>>>;

/// Makes one call at a time.
pub(super) struct KvCaller {
    client: KvClient<UnaryChannel>,
    keys: KeySpace,
    random: Random,
    block: BytesMut,
    revisions: Revisions,
    epoch: Instant,
}

impl KvCaller {
    /// Caller `number`. Time stamps count from `epoch`; `revisions` has a slot for each key that is swapped.
    pub(super) fn new(
        channel: UnaryChannel,
        keys: KeySpace,
        number: u32,
        revisions: Revisions,
        epoch: Instant,
    ) -> Self {
        let client = KvClient::new(channel).max_decoding_message_size(usize::MAX);
        let random = keys.random(number);
        Self { client, keys, random, block: BytesMut::new(), revisions, epoch }
    }

    /// Makes call `number`, whose latency is measured from `start`.
    pub(super) async fn call(&mut self, operation: Operation, number: u64, start: Instant) -> Result<Outcome, Failure> {
        match operation {
            Operation::Put => {
                let key = self.random_key();
                let value = self.keys.value(&mut self.random);
                self.put(key, value).await
            }
            Operation::PutInOrder => self.put_number(number).await,
            Operation::PutShuffled => self.put_number(self.keys.shuffled(number)).await,
            Operation::PutStamped => {
                let (key, value) = (self.random_key(), self.stamp(start));
                self.put(key, value).await
            }
            Operation::Get { serializable } => self.get(serializable).await,
            Operation::List(listing) => self.list(listing).await,
            Operation::Swap => self.swap().await,
        }
    }

    /// Whether the key space already holds the keys, with the sizes, that a fill would write.
    pub(super) async fn is_filled(&mut self) -> Result<bool, Failure> {
        let (key, range_end) = (self.key(0), self.key(self.keys.count()));
        let first = self.range(RangeRequest { key: key.clone(), ..RangeRequest::default() }).await?;
        let all = self.range(RangeRequest { key, range_end, count_only: true, ..RangeRequest::default() }).await?;
        let first_fits = first.kvs.first().is_some_and(|kv| kv.value.len() == self.keys.value_size());
        Ok(first_fits && u64::try_from(all.count) == Ok(self.keys.count()))
    }

    fn key(&mut self, number: u64) -> Bytes {
        self.keys.key(number, &mut self.block)
    }

    fn random_key(&mut self) -> Bytes {
        let number = self.random.below(self.keys.count());
        self.key(number)
    }

    /// A value that begins with the nanoseconds from `epoch` to `start`.
    fn stamp(&mut self, start: Instant) -> Bytes {
        let mut value = BytesMut::with_capacity(self.keys.value_size());
        value.put_u64(u64::try_from((start - self.epoch).as_nanos()).expect("no run takes centuries"));
        let rest = self.keys.value(&mut self.random);
        value.put_slice(&rest[size_of::<u64>()..]);
        value.freeze()
    }

    async fn put_number(&mut self, number: u64) -> Result<Outcome, Failure> {
        let key = self.key(number);
        let value = self.keys.value(&mut self.random);
        self.put(key, value).await
    }

    async fn put(&mut self, key: Bytes, value: Bytes) -> Result<Outcome, Failure> {
        self.client.put(PutRequest { key, value, ..PutRequest::default() }).await?;
        Ok(Outcome::Done)
    }

    async fn range(&mut self, request: RangeRequest) -> Result<RangeResponse, Failure> {
        Ok(self.client.range(request).await?.into_inner())
    }

    async fn get(&mut self, serializable: bool) -> Result<Outcome, Failure> {
        let key = self.random_key();
        let answer = self.range(RangeRequest { key: key.clone(), serializable, ..RangeRequest::default() }).await?;
        match answer.kvs.as_slice() {
            [kv] if kv.key == key => Ok(Outcome::Done),
            others => Err(Failure::wrong_answer(format!("asked for {key:?}, got {} keys", others.len()))),
        }
    }

    async fn list(&mut self, listing: Listing) -> Result<Outcome, Failure> {
        let Listing { keys, limit, keys_only, serializable } = listing;
        let first = self.random.below(self.keys.count() - keys + 1);
        let (key, range_end) = (self.key(first), self.key(first + keys));
        let limit_or_all = if limit < keys { i64::try_from(limit).unwrap_or(i64::MAX) } else { 0 };
        let request =
            RangeRequest { key, range_end, limit: limit_or_all, keys_only, serializable, ..RangeRequest::default() };
        let answer = self.range(request).await?;
        let (returned, counted) = (answer.kvs.len() as u64, answer.count);
        if returned == limit && u64::try_from(counted) == Ok(keys) {
            Ok(Outcome::Done)
        } else {
            Err(Failure::wrong_answer(format!("asked for {limit} of {keys} keys, got {returned} of {counted}")))
        }
    }

    async fn swap(&mut self) -> Result<Outcome, Failure> {
        let number = self.random.below(self.keys.count());
        let slot = usize::try_from(number).expect("there is a slot for each key");
        let seen = self.revisions.borrow()[slot];
        let key = self.key(number);
        let value = self.keys.value(&mut self.random);
        let answer = self.client.txn(swap(key, value, seen)).await?.into_inner();
        let (outcome, revision) = swapped(&answer)?;
        let mut revisions = self.revisions.borrow_mut();
        revisions[slot] = revisions[slot].max(revision);
        Ok(outcome)
    }
}

/// The age of a value with a time stamp; None if it has none.
pub(super) fn age(value: &[u8], epoch: Instant) -> Option<Duration> {
    let stamp = u64::from_be_bytes(*value.first_chunk()?);
    epoch.elapsed().checked_sub(Duration::from_nanos(stamp))
}

/// Writes `value` if `key` was last modified at revision `seen`, and reads it otherwise.
fn swap(key: Bytes, value: Bytes, seen: i64) -> TxnRequest {
    let condition = Compare {
        result: compare::CompareResult::Equal.into(),
        target: compare::CompareTarget::Mod.into(),
        key: key.clone(),
        target_union: Some(compare::TargetUnion::ModRevision(seen)),
        ..Compare::default()
    };
    let put = PutRequest { key: key.clone(), value, ..PutRequest::default() };
    let get = RangeRequest { key, keys_only: true, ..RangeRequest::default() };
    TxnRequest {
        compare: vec![condition],
        success: vec![RequestOp { request: Some(request_op::Request::RequestPut(put)) }],
        failure: vec![RequestOp { request: Some(request_op::Request::RequestRange(get)) }],
    }
}

/// The outcome of a swap, and the modification revision of its key.
fn swapped(answer: &TxnResponse) -> Result<(Outcome, i64), Failure> {
    if answer.succeeded {
        let header =
            answer.header.as_ref().ok_or_else(|| Failure::wrong_answer("a transaction response without a header"))?;
        return Ok((Outcome::Done, header.revision));
    }
    match answer.responses.first().and_then(|op| op.response.as_ref()) {
        Some(response_op::Response::ResponseRange(range)) => match range.kvs.first() {
            Some(kv) => Ok((Outcome::Lost, kv.mod_revision)),
            None => Err(Failure::wrong_answer("a key to be swapped does not exist")),
        },
        _ => Err(Failure::wrong_answer("a transaction response without the range of the failure branch")),
    }
}

#[cfg(test)]
mod tests {
    use crate::proto::{
        etcdserverpb::{ResponseHeader, ResponseOp},
        mvccpb::KeyValue,
    };

    use super::*;

    #[test]
    fn the_age_of_a_value_is_computed_from_its_stamp() {
        let epoch = Instant::now();
        let stamp = 0u64.to_be_bytes();
        assert!(age(&stamp, epoch).is_some_and(|age| age <= epoch.elapsed()));
        assert_eq!(age(b"short", epoch), None);
        assert_eq!(age(&u64::MAX.to_be_bytes(), epoch), None, "a stamp in the future is invalid");
    }

    #[test]
    fn a_swap_learns_the_revision_whether_it_won_or_lost() {
        let header = Some(ResponseHeader { revision: 9, ..ResponseHeader::default() });
        let won = TxnResponse { header, succeeded: true, responses: Vec::new() };
        assert_eq!(swapped(&won), Ok((Outcome::Done, 9)));
        let kv = KeyValue { mod_revision: 5, ..KeyValue::default() };
        let read = RangeResponse { kvs: vec![kv], ..RangeResponse::default() };
        let response = Some(response_op::Response::ResponseRange(read));
        let lost = TxnResponse { header, succeeded: false, responses: vec![ResponseOp { response }] };
        assert_eq!(swapped(&lost), Ok((Outcome::Lost, 5)));
        let neither = TxnResponse { succeeded: false, ..TxnResponse::default() };
        assert!(swapped(&neither).is_err());
    }
}
