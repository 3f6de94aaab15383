package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func putGetDelete(ctx context.Context, env testEnv) error {
	first, err := env.client.Put(ctx, "a", "1")
	if err != nil {
		return err
	}
	second, err := env.client.Put(ctx, "a", "2", clientv3.WithPrevKV())
	if err != nil {
		return err
	}
	got, err := env.client.Get(ctx, "a")
	if err != nil {
		return err
	}
	old, err := env.client.Get(ctx, "a", clientv3.WithRev(first.Header.Revision))
	if err != nil {
		return err
	}
	gone, err := env.client.Delete(ctx, "a", clientv3.WithPrevKV())
	if err != nil {
		return err
	}
	none, err := env.client.Get(ctx, "a")
	if err != nil {
		return err
	}
	_, noKey := env.client.Put(ctx, "", "x")
	_, missing := env.client.Put(ctx, "a", "", clientv3.WithIgnoreValue())
	return errors.Join(
		expectf(second.Header.Revision == first.Header.Revision+1, "two puts were not one revision apart"),
		expectf(second.PrevKv != nil && string(second.PrevKv.Value) == "1", "the previous value is %v", second.PrevKv),
		expectf(len(got.Kvs) == 1 && string(got.Kvs[0].Value) == "2" && got.Kvs[0].Version == 2, "got %v", got),
		expectf(len(old.Kvs) == 1 && string(old.Kvs[0].Value) == "1", "got %v of the past", old),
		expectf(old.Header.Revision == second.Header.Revision, "a read of the past does not return the current revision"),
		expectf(gone.Deleted == 1 && string(gone.PrevKvs[0].Value) == "2", "deleted %v", gone),
		expectf(len(none.Kvs) == 0 && none.Count == 0, "got %v after it was deleted", none),
		expectf(errors.Is(noKey, rpctypes.ErrEmptyKey), "a put without a key: %v", noKey),
		expectf(errors.Is(missing, rpctypes.ErrKeyNotFound), "keeping the value of a missing key: %v", missing),
	)
}

// fill puts n keys under a prefix, in descending order.
func fill(ctx context.Context, env testEnv, prefix string, n int) error {
	for i := n - 1; i >= 0; i-- {
		if _, err := env.client.Put(ctx, fmt.Sprintf("%s%04d", prefix, i), fmt.Sprint(i)); err != nil {
			return err
		}
	}
	return nil
}

func getWithOptions(ctx context.Context, env testEnv) error {
	if err := fill(ctx, env, "k", 20); err != nil {
		return err
	}
	names := func(options ...clientv3.OpOption) string {
		got, err := env.client.Get(ctx, "k", options...)
		if err != nil {
			return err.Error()
		}
		var keys []string
		for _, kv := range got.Kvs {
			keys = append(keys, strings.TrimPrefix(string(kv.Key), "k00"))
		}
		return fmt.Sprint(strings.Join(keys, " "), " of ", got.Count, " more ", got.More)
	}
	is := func(got, want string) error { return expectf(got == want, "got %q and not %q", got, want) }
	prefix := clientv3.WithPrefix()
	return errors.Join(
		is(names(prefix, clientv3.WithLimit(3)), "00 01 02 of 20 more true"),
		is(names(prefix, clientv3.WithLimit(2), clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend)), "19 18 of 20 more true"),
		is(names(clientv3.WithLastCreate()...), "00 of 20 more true"),
		is(names(clientv3.WithFirstCreate()...), "19 of 20 more true"),
		is(names(prefix, clientv3.WithCountOnly()), " of 20 more false"),
		is(names(clientv3.WithRange("k0003"), clientv3.WithKeysOnly()), "00 01 02 of 3 more false"),
		is(names(clientv3.WithFromKey(), clientv3.WithLimit(1), clientv3.WithSerializable()), "00 of 20 more true"),
	)
}

func getStream(ctx context.Context, env testEnv) error {
	if err := fill(ctx, env, "s", 300); err != nil {
		return err
	}
	whole, err := env.client.Get(ctx, "s", clientv3.WithPrefix())
	if err != nil {
		return err
	}
	stream, err := env.client.GetStream(ctx, "s", clientv3.WithPrefix())
	if err != nil {
		return err
	}
	merged, err := clientv3.GetStreamToGetResponse(stream)
	if err != nil {
		return err
	}
	if err := expectf(merged.Count == 300 && len(merged.Kvs) == 300, "a stream of %d of %d keys", len(merged.Kvs), merged.Count); err != nil {
		return err
	}
	for i, kv := range whole.Kvs {
		if err := expectf(kv.String() == merged.Kvs[i].String(), "key %d of a stream is %v and not %v", i, merged.Kvs[i], kv); err != nil {
			return err
		}
	}
	return expectf(merged.Header.Revision == whole.Header.Revision, "the stream has another revision")
}

func transactions(ctx context.Context, env testEnv) error {
	swap := func(from, to string) (*clientv3.TxnResponse, error) {
		return env.client.Txn(ctx).
			If(clientv3.Compare(clientv3.Value("t"), "=", from)).
			Then(clientv3.OpPut("t", to), clientv3.OpGet("t")).
			Else(clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpGet("t")}, nil)).
			Commit()
	}
	if _, err := env.client.Put(ctx, "t", "1"); err != nil {
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
	if err := errors.Join(
		expectf(done.Succeeded && len(done.Responses) == 2, "a swap answered %v", done),
		expectf(!refused.Succeeded && len(refused.Responses) == 1, "a swap of another value answered %v", refused),
		expectf(refused.Header.Revision == done.Header.Revision, "a swap that was refused created a revision"),
	); err != nil {
		return err
	}
	seen := done.Responses[1].GetResponseRange().Kvs[0]
	inner := refused.Responses[0].GetResponseTxn().Responses[0].GetResponseRange().Kvs[0]
	_, twice := env.client.Txn(ctx).Then(clientv3.OpPut("t", "4"), clientv3.OpPut("t", "5")).Commit()
	return errors.Join(
		expectf(string(seen.Value) == "2", "a transaction does not see its own write but %v", seen),
		expectf(string(inner.Value) == "2", "the inner transaction sees %v", inner),
		expectf(errors.Is(twice, rpctypes.ErrDuplicateKey), "one key twice: %v", twice),
	)
}

// nestedTransactions nests transactions as deeply as operations are allowed in one (128), and one level more.
func nestedTransactions(ctx context.Context, env testEnv) error {
	nested := func(levels int) (*clientv3.TxnResponse, error) {
		op := clientv3.OpPut("deep", fmt.Sprint(levels))
		for i := 1; i < levels; i++ {
			op = clientv3.OpTxn(nil, []clientv3.Op{op}, nil)
		}
		return env.client.Txn(ctx).Then(op).Commit()
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
		got, err := env.client.Get(ctx, "deep")
		if err := errors.Join(
			err,
			expectf(op.GetResponsePut() != nil, "%d levels were answered with %v", levels, op),
			expectf(err != nil || string(got.Kvs[0].Value) == fmt.Sprint(levels), "after %d levels the value is %v", levels, got),
		); err != nil {
			return err
		}
	}
	_, deeper := nested(129)
	_, muchDeeper := nested(600)
	return errors.Join(
		expectf(errors.Is(deeper, rpctypes.ErrTooManyOps), "129 levels: %v", deeper),
		expectf(errors.Is(muchDeeper, rpctypes.ErrTooManyOps), "600 levels: %v", muchDeeper),
	)
}

func compaction(ctx context.Context, env testEnv) error {
	if err := fill(ctx, env, "c", 10); err != nil {
		return err
	}
	last, err := env.client.Put(ctx, "c0000", "new")
	if err != nil {
		return err
	}
	head := last.Header.Revision
	if _, err := env.client.Compact(ctx, head, clientv3.WithCompactPhysical()); err != nil {
		return err
	}
	_, again := env.client.Compact(ctx, head)
	_, future := env.client.Compact(ctx, head+1)
	_, past := env.client.Get(ctx, "c", clientv3.WithRev(head-1))
	_, ahead := env.client.Get(ctx, "c", clientv3.WithRev(head+1))
	now, err := env.client.Get(ctx, "c", clientv3.WithPrefix(), clientv3.WithRev(head))
	return errors.Join(
		err,
		expectf(errors.Is(again, rpctypes.ErrCompacted), "compacting twice: %v", again),
		expectf(errors.Is(future, rpctypes.ErrFutureRev), "compacting the future: %v", future),
		expectf(errors.Is(past, rpctypes.ErrCompacted), "reading what was compacted: %v", past),
		expectf(errors.Is(ahead, rpctypes.ErrFutureRev), "reading the future: %v", ahead),
		expectf(err != nil || now.Count == 10, "after a compaction got %v", now),
	)
}

func maintenance(ctx context.Context, env testEnv) error {
	put, err := env.client.Put(ctx, "m", "1")
	if err != nil {
		return err
	}
	before, err := env.client.HashKV(ctx, env.endpoint, put.Header.Revision)
	if err != nil {
		return err
	}
	if _, err := env.client.Put(ctx, "m", "2"); err != nil {
		return err
	}
	same, err := env.client.HashKV(ctx, env.endpoint, put.Header.Revision)
	if err != nil {
		return err
	}
	other, err := env.client.HashKV(ctx, env.endpoint, 0)
	if err != nil {
		return err
	}
	status, err := env.client.Status(ctx, env.endpoint)
	if err != nil {
		return err
	}
	members, err := env.client.MemberList(ctx)
	if err != nil {
		return err
	}
	alarms, err := env.client.AlarmList(ctx)
	if err != nil {
		return err
	}
	return errors.Join(
		expectf(before.Hash == same.Hash && before.Hash != other.Hash, "hashes %d, %d and %d", before.Hash, same.Hash, other.Hash),
		expectf(status.Version == "3.7.3" && status.StorageVersion == "3.7.0", "the version is %s, the storage version %s", status.Version, status.StorageVersion),
		expectf(status.Leader == status.Header.MemberId && status.DbSize > 0 && len(status.Errors) == 0, "the status is %v", status),
		expectf(len(members.Members) == 1 && members.Members[0].ID == status.Leader, "the members are %v", members.Members),
		expectf(len(alarms.Alarms) == 0, "alarms: %v", alarms),
	)
}
