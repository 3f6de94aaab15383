package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func keys(ctx context.Context, s setting) error {
	first, err := s.client.Put(ctx, "a", "1")
	if err != nil {
		return err
	}
	second, err := s.client.Put(ctx, "a", "2", clientv3.WithPrevKV())
	if err != nil {
		return err
	}
	got, err := s.client.Get(ctx, "a")
	if err != nil {
		return err
	}
	old, err := s.client.Get(ctx, "a", clientv3.WithRev(first.Header.Revision))
	if err != nil {
		return err
	}
	gone, err := s.client.Delete(ctx, "a", clientv3.WithPrevKV())
	if err != nil {
		return err
	}
	none, err := s.client.Get(ctx, "a")
	if err != nil {
		return err
	}
	_, noKey := s.client.Put(ctx, "", "x")
	_, missing := s.client.Put(ctx, "a", "", clientv3.WithIgnoreValue())
	return wrong(
		must(second.Header.Revision == first.Header.Revision+1, "two puts were not one revision apart"),
		must(second.PrevKv != nil && string(second.PrevKv.Value) == "1", "the previous value is %v", second.PrevKv),
		must(len(got.Kvs) == 1 && string(got.Kvs[0].Value) == "2" && got.Kvs[0].Version == 2, "got %v", got),
		must(len(old.Kvs) == 1 && string(old.Kvs[0].Value) == "1", "got %v of the past", old),
		must(old.Header.Revision == second.Header.Revision, "a read of the past does not tell the present revision"),
		must(gone.Deleted == 1 && string(gone.PrevKvs[0].Value) == "2", "deleted %v", gone),
		must(len(none.Kvs) == 0 && none.Count == 0, "got %v after it was deleted", none),
		must(errors.Is(noKey, rpctypes.ErrEmptyKey), "a put without a key: %v", noKey),
		must(errors.Is(missing, rpctypes.ErrKeyNotFound), "keeping the value of a missing key: %v", missing),
	)
}

// fill puts n keys under a prefix, in descending order.
func fill(ctx context.Context, s setting, prefix string, n int) error {
	for i := n - 1; i >= 0; i-- {
		if _, err := s.client.Put(ctx, fmt.Sprintf("%s%04d", prefix, i), fmt.Sprint(i)); err != nil {
			return err
		}
	}
	return nil
}

func lists(ctx context.Context, s setting) error {
	if err := fill(ctx, s, "k", 20); err != nil {
		return err
	}
	names := func(options ...clientv3.OpOption) string {
		got, err := s.client.Get(ctx, "k", options...)
		if err != nil {
			return err.Error()
		}
		var keys []string
		for _, kv := range got.Kvs {
			keys = append(keys, strings.TrimPrefix(string(kv.Key), "k00"))
		}
		return fmt.Sprint(strings.Join(keys, " "), " of ", got.Count, " more ", got.More)
	}
	is := func(got, want string) error { return must(got == want, "got %q and not %q", got, want) }
	prefix := clientv3.WithPrefix()
	return wrong(
		is(names(prefix, clientv3.WithLimit(3)), "00 01 02 of 20 more true"),
		is(names(prefix, clientv3.WithLimit(2), clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend)), "19 18 of 20 more true"),
		is(names(clientv3.WithLastCreate()...), "00 of 20 more true"),
		is(names(clientv3.WithFirstCreate()...), "19 of 20 more true"),
		is(names(prefix, clientv3.WithCountOnly()), " of 20 more false"),
		is(names(clientv3.WithRange("k0003"), clientv3.WithKeysOnly()), "00 01 02 of 3 more false"),
		is(names(clientv3.WithFromKey(), clientv3.WithLimit(1), clientv3.WithSerializable()), "00 of 20 more true"),
	)
}

func streams(ctx context.Context, s setting) error {
	if err := fill(ctx, s, "s", 300); err != nil {
		return err
	}
	whole, err := s.client.Get(ctx, "s", clientv3.WithPrefix())
	if err != nil {
		return err
	}
	stream, err := s.client.GetStream(ctx, "s", clientv3.WithPrefix())
	if err != nil {
		return err
	}
	merged, err := clientv3.GetStreamToGetResponse(stream)
	if err != nil {
		return err
	}
	if err := must(merged.Count == 300 && len(merged.Kvs) == 300, "a stream of %d of %d keys", len(merged.Kvs), merged.Count); err != nil {
		return err
	}
	for i, kv := range whole.Kvs {
		if err := must(kv.String() == merged.Kvs[i].String(), "key %d of a stream is %v and not %v", i, merged.Kvs[i], kv); err != nil {
			return err
		}
	}
	return must(merged.Header.Revision == whole.Header.Revision, "a stream of another revision")
}

func transactions(ctx context.Context, s setting) error {
	swap := func(from, to string) (*clientv3.TxnResponse, error) {
		return s.client.Txn(ctx).
			If(clientv3.Compare(clientv3.Value("t"), "=", from)).
			Then(clientv3.OpPut("t", to), clientv3.OpGet("t")).
			Else(clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpGet("t")}, nil)).
			Commit()
	}
	if _, err := s.client.Put(ctx, "t", "1"); err != nil {
		return err
	}
	done, err := swap("1", "2")
	if err != nil {
		return err
	}
	refused, err := swap("1", "3")
	if err != nil {
		return err
	}
	if err := wrong(
		must(done.Succeeded && len(done.Responses) == 2, "a swap answered %v", done),
		must(!refused.Succeeded && len(refused.Responses) == 1, "a swap of another value answered %v", refused),
		must(refused.Header.Revision == done.Header.Revision, "a swap that was refused made a revision"),
	); err != nil {
		return err
	}
	seen := done.Responses[1].GetResponseRange().Kvs[0]
	inner := refused.Responses[0].GetResponseTxn().Responses[0].GetResponseRange().Kvs[0]
	_, twice := s.client.Txn(ctx).Then(clientv3.OpPut("t", "4"), clientv3.OpPut("t", "5")).Commit()
	return wrong(
		must(string(seen.Value) == "2", "a transaction does not see its own write but %v", seen),
		must(string(inner.Value) == "2", "the inner transaction sees %v", inner),
		must(errors.Is(twice, rpctypes.ErrDuplicateKey), "one key twice: %v", twice),
	)
}

// depths has transactions inside transactions, to as many as there may be operations, and one more.
func depths(ctx context.Context, s setting) error {
	nested := func(levels int) (*clientv3.TxnResponse, error) {
		op := clientv3.OpPut("deep", fmt.Sprint(levels))
		for i := 1; i < levels; i++ {
			op = clientv3.OpTxn(nil, []clientv3.Op{op}, nil)
		}
		return s.client.Txn(ctx).Then(op).Commit()
	}
	for _, levels := range []int{49, 50, 128} {
		done, err := nested(levels)
		if err != nil {
			return fmt.Errorf("%d levels: %w", levels, err)
		}
		op := done.Responses[0]
		for i := 1; i < levels; i++ {
			op = op.GetResponseTxn().Responses[0]
		}
		got, err := s.client.Get(ctx, "deep")
		if err := wrong(
			err,
			must(op.GetResponsePut() != nil, "%d levels were answered with %v", levels, op),
			must(err != nil || string(got.Kvs[0].Value) == fmt.Sprint(levels), "after %d levels there is %v", levels, got),
		); err != nil {
			return err
		}
	}
	_, deeper := nested(129)
	_, muchDeeper := nested(600)
	return wrong(
		must(errors.Is(deeper, rpctypes.ErrTooManyOps), "129 levels: %v", deeper),
		must(errors.Is(muchDeeper, rpctypes.ErrTooManyOps), "600 levels: %v", muchDeeper),
	)
}

func compaction(ctx context.Context, s setting) error {
	if err := fill(ctx, s, "c", 10); err != nil {
		return err
	}
	last, err := s.client.Put(ctx, "c0000", "new")
	if err != nil {
		return err
	}
	head := last.Header.Revision
	if _, err := s.client.Compact(ctx, head, clientv3.WithCompactPhysical()); err != nil {
		return err
	}
	_, again := s.client.Compact(ctx, head)
	_, future := s.client.Compact(ctx, head+1)
	_, past := s.client.Get(ctx, "c", clientv3.WithRev(head-1))
	_, ahead := s.client.Get(ctx, "c", clientv3.WithRev(head+1))
	now, err := s.client.Get(ctx, "c", clientv3.WithPrefix(), clientv3.WithRev(head))
	return wrong(
		err,
		must(errors.Is(again, rpctypes.ErrCompacted), "compacting twice: %v", again),
		must(errors.Is(future, rpctypes.ErrFutureRev), "compacting the future: %v", future),
		must(errors.Is(past, rpctypes.ErrCompacted), "reading what was compacted: %v", past),
		must(errors.Is(ahead, rpctypes.ErrFutureRev), "reading the future: %v", ahead),
		must(err != nil || now.Count == 10, "after a compaction there is %v", now),
	)
}

func maintenance(ctx context.Context, s setting) error {
	put, err := s.client.Put(ctx, "m", "1")
	if err != nil {
		return err
	}
	before, err := s.client.HashKV(ctx, s.endpoint, put.Header.Revision)
	if err != nil {
		return err
	}
	if _, err := s.client.Put(ctx, "m", "2"); err != nil {
		return err
	}
	same, err := s.client.HashKV(ctx, s.endpoint, put.Header.Revision)
	if err != nil {
		return err
	}
	other, err := s.client.HashKV(ctx, s.endpoint, 0)
	if err != nil {
		return err
	}
	status, err := s.client.Status(ctx, s.endpoint)
	if err != nil {
		return err
	}
	members, err := s.client.MemberList(ctx)
	if err != nil {
		return err
	}
	alarms, err := s.client.AlarmList(ctx)
	if err != nil {
		return err
	}
	return wrong(
		must(before.Hash == same.Hash && before.Hash != other.Hash, "hashes %d, %d and %d", before.Hash, same.Hash, other.Hash),
		must(status.Version == "3.7.3" && status.StorageVersion == "3.7.0", "the version is %s, of the storage %s", status.Version, status.StorageVersion),
		must(status.Leader == status.Header.MemberId && status.DbSize > 0 && len(status.Errors) == 0, "the status is %v", status),
		must(len(members.Members) == 1 && members.Members[0].ID == status.Leader, "the members are %v", members.Members),
		must(len(alarms.Alarms) == 0, "alarms: %v", alarms),
	)
}
