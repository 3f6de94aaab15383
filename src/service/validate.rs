//! Checks that need the request alone, in etcd's order.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use crate::{
    error::Error,
    proto::etcdserverpb::{
        DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
        range_request::{SortOrder, SortTarget},
        request_op,
    },
};

/// Refuses a Range without a key, or with a sort that does not exist.
pub fn range(range: &RangeRequest) -> Result<(), Error> {
    if range.key.is_empty() {
        return Err(Error::EmptyKey);
    }
    if SortOrder::try_from(range.sort_order).is_err() || SortTarget::try_from(range.sort_target).is_err() {
        return Err(Error::InvalidSortOption);
    }
    Ok(())
}

/// Refuses, in addition, what a RangeStream does not support.
pub fn range_stream(request: &RangeRequest) -> Result<(), Error> {
    range(request)?;
    let default_order = request.sort_order == SortOrder::None as i32
        || (request.sort_order == SortOrder::Ascend as i32 && request.sort_target == SortTarget::Key as i32);
    if !default_order {
        return Err(Error::Unimplemented("RangeStream does not support custom sort orders"));
    }
    let filters =
        [request.min_mod_revision, request.max_mod_revision, request.min_create_revision, request.max_create_revision];
    if filters != [0; 4] {
        return Err(Error::Unimplemented("RangeStream does not support revision filters"));
    }
    Ok(())
}

/// Refuses a Put without a key, or whose flags contradict its fields.
pub fn put(put: &PutRequest) -> Result<(), Error> {
    if put.key.is_empty() {
        return Err(Error::EmptyKey);
    }
    if put.ignore_value && !put.value.is_empty() {
        return Err(Error::ValueProvided);
    }
    if put.ignore_lease && put.lease != 0 {
        return Err(Error::LeaseProvided);
    }
    Ok(())
}

/// Refuses a deletion without a key.
pub fn delete_range(delete: &DeleteRangeRequest) -> Result<(), Error> {
    if delete.key.is_empty() { Err(Error::EmptyKey) } else { Ok(()) }
}

/// Refuses a transaction that is too large, is malformed in any branch, or writes a key twice in one.
pub fn txn(request: &TxnRequest, max_ops: usize, max_depth: usize) -> Result<(), Error> {
    txn_ops(request, max_ops, max_depth, max_depth)?;
    for branch in [&request.success, &request.failure] {
        footprint(branch)?;
    }
    Ok(())
}

/// `allowed` shrinks with each level of nesting by what the level above used; siblings do not add up. `levels` are those that
/// this transaction and its nested ones may have.
fn txn_ops(txn: &TxnRequest, allowed: usize, levels: usize, max_depth: usize) -> Result<(), Error> {
    let ops = txn.compare.len().max(txn.success.len()).max(txn.failure.len());
    let Some(left) = allowed.checked_sub(ops) else { return Err(Error::TooManyOps) };
    let Some(levels_left) = levels.checked_sub(1) else { return Err(Error::TxnTooDeep(max_depth)) };
    if txn.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(Error::EmptyKey);
    }
    for op in txn.success.iter().chain(&txn.failure) {
        match &op.request {
            Some(request_op::Request::RequestRange(request)) => range(request)?,
            Some(request_op::Request::RequestPut(request)) => put(request)?,
            Some(request_op::Request::RequestDeleteRange(request)) => delete_range(request)?,
            Some(request_op::Request::RequestTxn(nested)) => txn_ops(nested, left, levels_left, max_depth)?,
            None => return Err(Error::KeyNotFound),
        }
    }
    Ok(())
}

/// What a branch writes: the keys that it puts and the intervals that it deletes.
#[derive(Default)]
struct Footprint {
    puts: BTreeSet<Bytes>,
    deletes: Intervals,
}

/// A union of half-open intervals: start → end, disjoint.
#[derive(Default)]
struct Intervals {
    ends: BTreeMap<Bytes, Bytes>,
}

impl Intervals {
    fn contains(&self, key: &Bytes) -> bool {
        self.ends.range(..=key.clone()).next_back().is_some_and(|(_, end)| key < end)
    }

    /// Adds an interval; one that is empty or inverted, as `[key, "\0")` is here, adds nothing.
    fn add(&mut self, mut start: Bytes, mut end: Bytes) {
        if start >= end {
            return;
        }
        while let Some((from, to)) = self.ends.range(..=end.clone()).next_back() {
            if to < &start {
                break;
            }
            let from = from.clone();
            let to = self.ends.remove(&from).expect("it was found a moment ago");
            start = start.min(from);
            end = end.max(to);
        }
        self.ends.insert(start, end);
    }

    fn add_delete(&mut self, delete: &DeleteRangeRequest) {
        let end = if delete.range_end.is_empty() {
            [delete.key.as_ref(), &[0]].concat().into() // The interval of a single key.
        } else {
            delete.range_end.clone()
        };
        self.add(delete.key.clone(), end);
    }
}

/// What a branch writes, or `DuplicateKey`. A key may not be put twice, nor put and deleted. But the two branches of a nested
/// transaction may share keys, as only one of them runs.
fn footprint(ops: &[RequestOp]) -> Result<Footprint, Error> {
    let mut all = Footprint::default();
    for op in ops {
        if let Some(request_op::Request::RequestDeleteRange(delete)) = &op.request {
            all.deletes.add_delete(delete);
        }
    }
    for op in ops {
        if let Some(request_op::Request::RequestTxn(nested)) = &op.request {
            all.merge_branches(footprint(&nested.success)?, footprint(&nested.failure)?)?;
        }
    }
    for op in ops {
        if let Some(request_op::Request::RequestPut(put)) = &op.request
            && (all.deletes.contains(&put.key) || !all.puts.insert(put.key.clone()))
        {
            return Err(Error::DuplicateKey);
        }
    }
    Ok(all)
}

impl Footprint {
    /// Adds what either branch of a nested transaction writes.
    fn merge_branches(&mut self, success: Self, failure: Self) -> Result<(), Error> {
        let puts: BTreeSet<Bytes> = success.puts.into_iter().chain(failure.puts).collect();
        if puts.iter().any(|put| self.puts.contains(put) || self.deletes.contains(put)) {
            return Err(Error::DuplicateKey);
        }
        self.puts.extend(puts);
        for (start, end) in success.deletes.ends.into_iter().chain(failure.deletes.ends) {
            self.deletes.add(start, end);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(request: request_op::Request) -> RequestOp {
        RequestOp { request: Some(request) }
    }

    fn put_op(key: &str) -> RequestOp {
        op(request_op::Request::RequestPut(PutRequest { key: key.to_owned().into(), ..Default::default() }))
    }

    fn delete_op(key: &str, end: &'static str) -> RequestOp {
        let delete = DeleteRangeRequest { key: key.to_owned().into(), range_end: end.into(), ..Default::default() };
        op(request_op::Request::RequestDeleteRange(delete))
    }

    fn txn_op(success: Vec<RequestOp>, failure: Vec<RequestOp>) -> RequestOp {
        op(request_op::Request::RequestTxn(TxnRequest { success, failure, ..Default::default() }))
    }

    fn check(success: Vec<RequestOp>, expected: Result<(), Error>) {
        let request = TxnRequest { success: success.clone(), ..Default::default() };
        assert_eq!(txn(&request, 128, 500), expected, "as success: {success:?}");
        let request = TxnRequest { failure: success, ..Default::default() };
        assert_eq!(txn(&request, 128, 500), expected, "as failure");
    }

    /// KV-23 and KV-53.
    #[test]
    fn duplicate_keys_in_nested_transactions_are_found_as_in_etcd() {
        let duplicate = || Err(Error::DuplicateKey);
        check(vec![put_op("a"), put_op("a")], duplicate());
        check(vec![put_op("a"), delete_op("a", "")], duplicate());
        check(vec![put_op("b"), delete_op("a", "c")], duplicate());
        check(vec![put_op("c"), delete_op("a", "c")], Ok(()));
        check(vec![delete_op("a", "c"), delete_op("b", "d")], Ok(()));
        check(vec![put_op("a"), txn_op(vec![put_op("a")], vec![])], duplicate());
        check(vec![txn_op(vec![put_op("a")], vec![put_op("a")])], Ok(()));
        check(vec![txn_op(vec![put_op("a")], vec![]), txn_op(vec![], vec![put_op("a")])], duplicate());
        // Here an end of one zero byte does not mean infinity, and an inverted interval is empty.
        check(vec![delete_op("a", "\0"), put_op("a"), put_op("b")], Ok(()));
        check(vec![delete_op("k", "k"), put_op("k")], Ok(()));
        // Between siblings, only a deletion before a put is a duplicate.
        check(vec![txn_op(vec![put_op("a")], vec![]), txn_op(vec![delete_op("a", "")], vec![])], Ok(()));
        check(vec![txn_op(vec![delete_op("a", "")], vec![]), txn_op(vec![put_op("a")], vec![])], duplicate());
    }

    /// KV-24.
    #[test]
    fn the_limit_of_operations_shrinks_with_depth_and_not_with_siblings() {
        let three = || vec![put_op("a"), put_op("b"), put_op("c")];
        let nested = |failure| TxnRequest { success: vec![txn_op(three(), failure)], ..Default::default() };
        assert_eq!(txn(&nested(vec![]), 4, 500), Ok(()));
        assert_eq!(txn(&nested(vec![]), 3, 500), Err(Error::TooManyOps));
        let siblings = TxnRequest {
            success: vec![
                txn_op(vec![put_op("a"), put_op("b")], vec![]),
                txn_op(vec![put_op("c"), put_op("d")], vec![]),
            ],
            ..Default::default()
        };
        assert_eq!(txn(&siblings, 4, 500), Ok(()));
    }

    #[test]
    fn levels_of_nesting_are_limited() {
        let two = TxnRequest { success: vec![txn_op(vec![put_op("a")], vec![])], ..Default::default() };
        let three =
            TxnRequest { failure: vec![op(request_op::Request::RequestTxn(two.clone()))], ..Default::default() };
        assert_eq!((txn(&two, 128, 2), txn(&two, 128, 1)), (Ok(()), Err(Error::TxnTooDeep(1))));
        assert_eq!((txn(&three, 128, 3), txn(&three, 128, 2)), (Ok(()), Err(Error::TxnTooDeep(2))));
        assert_eq!(txn(&three, 1, 1), Err(Error::TooManyOps), "operations are counted first");
    }

    /// KV-26, KV-27 and KV-28.
    #[test]
    fn malformed_requests_have_etcds_errors() {
        check(vec![RequestOp { request: None }], Err(Error::KeyNotFound));
        check(vec![put_op("")], Err(Error::EmptyKey));
        let sorted = RangeRequest { key: "k".into(), sort_order: 7, ..Default::default() };
        assert_eq!(range(&sorted), Err(Error::InvalidSortOption));
        let both = PutRequest { key: "k".into(), value: "v".into(), ignore_value: true, ..Default::default() };
        assert_eq!(put(&both), Err(Error::ValueProvided));
        let both = PutRequest { key: "k".into(), lease: 1, ignore_lease: true, ..Default::default() };
        assert_eq!(put(&both), Err(Error::LeaseProvided));
    }

    #[test]
    fn intervals_merge_where_they_touch() {
        let mut intervals = Intervals::default();
        for (start, end) in [("b", "d"), ("f", "h"), ("c", "g"), ("x", "z"), ("y", "y")] {
            intervals.add(start.into(), end.into());
        }
        assert_eq!(intervals.ends.len(), 2);
        for (key, inside) in
            [("a", false), ("b", true), ("e", true), ("g", true), ("h", false), ("y", true), ("z", false)]
        {
            assert_eq!(intervals.contains(&key.into()), inside, "{key}");
        }
    }
}
