package main

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// nextEvents receives n events from a watch and formats them: +key=value, with the previous value in brackets, or -key.
func nextEvents(ctx context.Context, events clientv3.WatchChan, n int) ([]string, error) {
	var received []string
	for len(received) < n {
		select {
		case response, open := <-events:
			if !open {
				return received, errors.New("the watch was closed")
			}
			if err := response.Err(); err != nil {
				return received, err
			}
			for _, event := range response.Events {
				received = append(received, formatEvent(event))
			}
		case <-ctx.Done():
			return received, fmt.Errorf("of %d events only %d arrived: %v", n, len(received), received)
		}
	}
	return received, nil
}

func formatEvent(event *clientv3.Event) string {
	text := "-" + string(event.Kv.Key)
	if event.Type == clientv3.EventTypePut {
		text = fmt.Sprintf("+%s=%s", event.Kv.Key, event.Kv.Value)
	}
	if event.PrevKv != nil {
		text += fmt.Sprintf("(%s)", event.PrevKv.Value)
	}
	return text
}

// expectEvents receives the next events, which must be these.
func expectEvents(ctx context.Context, events clientv3.WatchChan, want ...string) error {
	got, err := nextEvents(ctx, events, len(want))
	if err != nil {
		return err
	}
	return expectf(fmt.Sprint(got) == fmt.Sprint(want), "the events are %v and not %v", got, want)
}

func watch(ctx context.Context, env testEnv) error {
	first, err := env.client.Put(ctx, "w/1", "a")
	if err != nil {
		return err
	}
	past := env.client.Watch(ctx, "w/", clientv3.WithPrefix(), clientv3.WithRev(first.Header.Revision), clientv3.WithPrevKV())
	deletes := env.client.Watch(ctx, "w/", clientv3.WithPrefix(), clientv3.WithFilterPut(), clientv3.WithCreatedNotify())
	if created := <-deletes; !created.Created {
		return fmt.Errorf("the first response is %v", created)
	}
	if _, err := env.client.Put(ctx, "w/1", "b"); err != nil {
		return err
	}
	both := env.client.Txn(ctx).Then(clientv3.OpPut("w/2", "c"), clientv3.OpDelete("w/1"))
	if _, err := both.Commit(); err != nil {
		return err
	}
	if err := env.client.RequestProgress(ctx); err != nil {
		return err
	}
	return errors.Join(
		expectEvents(ctx, past, "+w/1=a", "+w/1=b(a)", "+w/2=c", "-w/1(b)"),
		expectEvents(ctx, deletes, "-w/1"),
	)
}

// watchResumes restarts the server during a watch: no event may be missing, none may arrive twice.
func watchResumes(ctx context.Context, env testEnv) error {
	events := env.client.Watch(ctx, "r", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	if created := <-events; !created.Created {
		return fmt.Errorf("the first response is %v", created)
	}
	idle := env.client.Watch(ctx, "idle", clientv3.WithCreatedNotify())
	if created := <-idle; !created.Created {
		return fmt.Errorf("the first response is %v", created)
	}
	const rounds, puts = 2, 50
	var want []string
	for round := range rounds {
		for i := range puts {
			key := fmt.Sprintf("r%d-%d", round, i)
			if _, err := env.client.Put(ctx, key, "x"); err != nil {
				return err
			}
			want = append(want, "+"+key+"=x")
		}
		if err := env.restart(); err != nil {
			return fmt.Errorf("cannot restart the server: %w", err)
		}
	}
	if err := retry(ctx, func() error { _, err := env.client.Put(ctx, "idle", "y"); return err }); err != nil {
		return err
	}
	return errors.Join(expectEvents(ctx, events, want...), expectEvents(ctx, idle, "+idle=y"))
}

// retry repeats a call until it succeeds, as a server may refuse it after a restart. The call must be idempotent.
func retry(ctx context.Context, try func() error) error {
	err := try()
	for err != nil && ctx.Err() == nil {
		err = try()
	}
	return err
}

func watchCompacted(ctx context.Context, env testEnv) error {
	if err := fill(ctx, env, "x", 5); err != nil {
		return err
	}
	last, err := env.client.Delete(ctx, "x0000")
	if err != nil {
		return err
	}
	head := last.Header.Revision
	if _, err := env.client.Compact(ctx, head); err != nil {
		return err
	}
	lost := <-env.client.Watch(ctx, "x", clientv3.WithPrefix(), clientv3.WithRev(head-2))
	kept := env.client.Watch(ctx, "x", clientv3.WithPrefix(), clientv3.WithRev(head))
	return errors.Join(
		expectf(errors.Is(lost.Err(), rpctypes.ErrCompacted) && lost.CompactRevision == head, "a watch from a compacted revision: %v", lost),
		expectEvents(ctx, kept, "-x0000"),
	)
}
