package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

func leaseExpires(ctx context.Context, env testEnv) error {
	lease, err := env.client.Grant(ctx, 1)
	if err != nil {
		return err
	}
	granted := time.Now()
	put, err := env.client.Put(ctx, "l", "x", clientv3.WithLease(lease.ID))
	if err != nil {
		return err
	}
	left, err := env.client.TimeToLive(ctx, lease.ID, clientv3.WithAttachedKeys())
	if err != nil {
		return err
	}
	leases, err := env.client.Leases(ctx)
	if err != nil {
		return err
	}
	if err := errors.Join(
		expectf(lease.TTL == 2, "the shortest lease lasts %d s", lease.TTL),
		expectf(left.GrantedTTL == 2 && len(left.Keys) == 1 && string(left.Keys[0]) == "l", "the lease is %v", left),
		expectf(len(leases.Leases) == 1 && leases.Leases[0].ID == lease.ID, "the leases are %v", leases.Leases),
		expectEvents(ctx, env.client.Watch(ctx, "l", clientv3.WithRev(put.Header.Revision+1)), "-l"),
	); err != nil {
		return err
	}
	lasted := time.Since(granted)
	gone, err := env.client.TimeToLive(ctx, lease.ID)
	if err != nil {
		return err
	}
	_, revoked := env.client.Revoke(ctx, lease.ID)
	_, renewed := env.client.KeepAliveOnce(ctx, lease.ID)
	_, late := env.client.Put(ctx, "l", "x", clientv3.WithLease(lease.ID))
	return errors.Join(
		expectf(lasted > 1900*time.Millisecond && lasted < 6*time.Second, "a lease of 2 s lasted %v", lasted),
		expectf(gone.TTL == -1, "a lease that has ended: %v", gone),
		expectf(errors.Is(revoked, rpctypes.ErrLeaseNotFound), "revoking it: %v", revoked),
		expectf(errors.Is(renewed, rpctypes.ErrLeaseNotFound), "renewing it: %v", renewed),
		expectf(errors.Is(late, rpctypes.ErrLeaseNotFound), "putting with it: %v", late),
	)
}

func leaseKeptAlive(ctx context.Context, env testEnv) error {
	lease, err := env.client.Grant(ctx, 2)
	if err != nil {
		return err
	}
	if _, err := env.client.Put(ctx, "alive", "x", clientv3.WithLease(lease.ID)); err != nil {
		return err
	}
	renewals, err := env.client.KeepAlive(ctx, lease.ID)
	if err != nil {
		return err
	}
	// Longer than the TTL of the lease, with a restart in the middle.
	for renewal := range 8 {
		if renewal == 4 {
			if err := env.restart(); err != nil {
				return fmt.Errorf("cannot restart the server: %w", err)
			}
		}
		answer, open := <-renewals
		if !open || answer.TTL != 2 {
			return fmt.Errorf("renewal %d is %v", renewal, answer)
		}
	}
	got, err := env.client.Get(ctx, "alive")
	if err != nil {
		return err
	}
	if _, err := env.client.Revoke(ctx, lease.ID); err != nil {
		return err
	}
	none, err := env.client.Get(ctx, "alive")
	return errors.Join(
		err,
		expectf(got.Count == 1, "the key of a lease that is kept alive is gone"),
		expectf(err != nil || none.Count == 0, "the key of a lease that was revoked still exists"),
	)
}

// newSessions opens two sessions on the same client.
func newSessions(env testEnv) (one, other *concurrency.Session, err error) {
	if one, err = concurrency.NewSession(env.client, concurrency.WithTTL(10)); err != nil {
		return nil, nil, err
	}
	other, err = concurrency.NewSession(env.client, concurrency.WithTTL(10))
	return one, other, err
}

func mutex(ctx context.Context, env testEnv) error {
	one, other, err := newSessions(env)
	if err != nil {
		return err
	}
	defer other.Close()
	holder, waiter := concurrency.NewMutex(one, "mutex"), concurrency.NewMutex(other, "mutex")
	if err := holder.Lock(ctx); err != nil {
		return err
	}
	if err := waiter.TryLock(ctx); !errors.Is(err, concurrency.ErrLocked) {
		return fmt.Errorf("a mutex that is held: %w", err)
	}
	entered := make(chan error, 1)
	go func() { entered <- waiter.Lock(ctx) }()
	// The waiter's key shows that it waits.
	err = retry(ctx, func() error {
		got, err := env.client.Get(ctx, "mutex/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			return err
		}
		return expectf(got.Count == 2, "there are %d keys", got.Count)
	})
	if err != nil {
		return err
	}
	select {
	case err := <-entered:
		return fmt.Errorf("two sessions hold the mutex: %w", err)
	default:
	}
	owner, err := env.client.Txn(ctx).If(holder.IsOwner()).Commit()
	if err != nil {
		return err
	}
	// Closing the session revokes its lease, which releases the mutex.
	if err := one.Close(); err != nil {
		return err
	}
	return errors.Join(
		expectf(owner.Succeeded, "the holder is not the owner"),
		<-entered,
		waiter.Unlock(ctx),
	)
}

func election(ctx context.Context, env testEnv) error {
	one, other, err := newSessions(env)
	if err != nil {
		return err
	}
	defer one.Close()
	defer other.Close()
	leader, candidate := concurrency.NewElection(one, "vote"), concurrency.NewElection(other, "vote")
	if _, err := candidate.Leader(ctx); !errors.Is(err, concurrency.ErrElectionNoLeader) {
		return fmt.Errorf("before the election: %w", err)
	}
	seen := candidate.Observe(ctx)
	if err := leader.Campaign(ctx, "one"); err != nil {
		return err
	}
	observed := func(want string) error {
		got, open := <-seen
		return expectf(open && string(got.Kvs[0].Value) == want, "the observed leader is %v and not %s", got, want)
	}
	elected := make(chan error, 1)
	if err := observed("one"); err != nil {
		return err
	}
	go func() { elected <- candidate.Campaign(ctx, "other") }()
	if err := leader.Proclaim(ctx, "still one"); err != nil {
		return err
	}
	if err := observed("still one"); err != nil {
		return err
	}
	select {
	case err := <-elected:
		return fmt.Errorf("there are two leaders: %w", err)
	default:
	}
	if err := leader.Resign(ctx); err != nil {
		return err
	}
	if err := errors.Join(<-elected, observed("other")); err != nil {
		return err
	}
	now, err := leader.Leader(ctx)
	if err != nil {
		return err
	}
	return errors.Join(
		expectf(string(now.Kvs[0].Value) == "other", "the leader is %v", now),
		expectf(errors.Is(leader.Proclaim(ctx, "x"), concurrency.ErrElectionNotLeader), "a leader that resigned can still proclaim"),
		candidate.Resign(ctx),
	)
}
