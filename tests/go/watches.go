package main

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// next takes n events from a watch and tells them in short: +key=value, with the previous value in brackets, or -key.
func next(ctx context.Context, events clientv3.WatchChan, n int) ([]string, error) {
	var told []string
	for len(told) < n {
		select {
		case response, open := <-events:
			if !open {
				return told, errors.New("the watch was closed")
			}
			if err := response.Err(); err != nil {
				return told, err
			}
			for _, event := range response.Events {
				told = append(told, short(event))
			}
		case <-ctx.Done():
			return told, fmt.Errorf("of %d events only %d came: %v", n, len(told), told)
		}
	}
	return told, nil
}

func short(event *clientv3.Event) string {
	text := "-" + string(event.Kv.Key)
	if event.Type == clientv3.EventTypePut {
		text = fmt.Sprintf("+%s=%s", event.Kv.Key, event.Kv.Value)
	}
	if event.PrevKv != nil {
		text += fmt.Sprintf("(%s)", event.PrevKv.Value)
	}
	return text
}

// expect takes as many events as it is given, which must be these.
func expect(ctx context.Context, events clientv3.WatchChan, want ...string) error {
	got, err := next(ctx, events, len(want))
	if err != nil {
		return err
	}
	return must(fmt.Sprint(got) == fmt.Sprint(want), "the events are %v and not %v", got, want)
}

func watch(ctx context.Context, s setting) error {
	first, err := s.client.Put(ctx, "w/1", "a")
	if err != nil {
		return err
	}
	past := s.client.Watch(ctx, "w/", clientv3.WithPrefix(), clientv3.WithRev(first.Header.Revision), clientv3.WithPrevKV())
	deletes := s.client.Watch(ctx, "w/", clientv3.WithPrefix(), clientv3.WithFilterPut(), clientv3.WithCreatedNotify())
	if created := <-deletes; !created.Created {
		return fmt.Errorf("the first response is %v", created)
	}
	if _, err := s.client.Put(ctx, "w/1", "b"); err != nil {
		return err
	}
	both := s.client.Txn(ctx).Then(clientv3.OpPut("w/2", "c"), clientv3.OpDelete("w/1"))
	if _, err := both.Commit(); err != nil {
		return err
	}
	if err := s.client.RequestProgress(ctx); err != nil {
		return err
	}
	return wrong(
		expect(ctx, past, "+w/1=a", "+w/1=b(a)", "+w/2=c", "-w/1(b)"),
		expect(ctx, deletes, "-w/1"),
	)
}

// watchResumes kills the server under a watch: no event is missing, none comes twice.
func watchResumes(ctx context.Context, s setting) error {
	events := s.client.Watch(ctx, "r", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	if created := <-events; !created.Created {
		return fmt.Errorf("the first response is %v", created)
	}
	idle := s.client.Watch(ctx, "idle", clientv3.WithCreatedNotify())
	if created := <-idle; !created.Created {
		return fmt.Errorf("the first response is %v", created)
	}
	const rounds, puts = 2, 50
	var want []string
	for round := range rounds {
		for i := range puts {
			key := fmt.Sprintf("r%d-%d", round, i)
			if _, err := s.client.Put(ctx, key, "x"); err != nil {
				return err
			}
			want = append(want, "+"+key+"=x")
		}
		if err := s.restart(); err != nil {
			return fmt.Errorf("cannot restart the server: %w", err)
		}
	}
	if err := eventually(ctx, func() error { _, err := s.client.Put(ctx, "idle", "y"); return err }); err != nil {
		return err
	}
	return wrong(expect(ctx, events, want...), expect(ctx, idle, "+idle=y"))
}

// eventually repeats what a server that has just been killed may refuse. It must be harmless to do twice.
func eventually(ctx context.Context, try func() error) error {
	err := try()
	for err != nil && ctx.Err() == nil {
		err = try()
	}
	return err
}

func watchCompacted(ctx context.Context, s setting) error {
	if err := fill(ctx, s, "x", 5); err != nil {
		return err
	}
	last, err := s.client.Delete(ctx, "x0000")
	if err != nil {
		return err
	}
	head := last.Header.Revision
	if _, err := s.client.Compact(ctx, head); err != nil {
		return err
	}
	lost := <-s.client.Watch(ctx, "x", clientv3.WithPrefix(), clientv3.WithRev(head-2))
	kept := s.client.Watch(ctx, "x", clientv3.WithPrefix(), clientv3.WithRev(head))
	return wrong(
		must(errors.Is(lost.Err(), rpctypes.ErrCompacted) && lost.CompactRevision == head, "a watch of what is gone: %v", lost),
		expect(ctx, kept, "-x0000"),
	)
}
