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

func leaseEnds(ctx context.Context, s setting) error {
	lease, err := s.client.Grant(ctx, 1)
	if err != nil {
		return err
	}
	granted := time.Now()
	put, err := s.client.Put(ctx, "l", "x", clientv3.WithLease(lease.ID))
	if err != nil {
		return err
	}
	left, err := s.client.TimeToLive(ctx, lease.ID, clientv3.WithAttachedKeys())
	if err != nil {
		return err
	}
	leases, err := s.client.Leases(ctx)
	if err != nil {
		return err
	}
	if err := wrong(
		must(lease.TTL == 2, "the shortest lease lasts %d s", lease.TTL),
		must(left.GrantedTTL == 2 && len(left.Keys) == 1 && string(left.Keys[0]) == "l", "the lease is %v", left),
		must(len(leases.Leases) == 1 && leases.Leases[0].ID == lease.ID, "the leases are %v", leases.Leases),
		expect(ctx, s.client.Watch(ctx, "l", clientv3.WithRev(put.Header.Revision+1)), "-l"),
	); err != nil {
		return err
	}
	lasted := time.Since(granted)
	gone, err := s.client.TimeToLive(ctx, lease.ID)
	if err != nil {
		return err
	}
	_, revoked := s.client.Revoke(ctx, lease.ID)
	_, renewed := s.client.KeepAliveOnce(ctx, lease.ID)
	_, late := s.client.Put(ctx, "l", "x", clientv3.WithLease(lease.ID))
	return wrong(
		must(lasted > 1900*time.Millisecond && lasted < 6*time.Second, "a lease of 2 s lasted %v", lasted),
		must(gone.TTL == -1, "a lease that has ended: %v", gone),
		must(errors.Is(revoked, rpctypes.ErrLeaseNotFound), "revoking it: %v", revoked),
		must(errors.Is(renewed, rpctypes.ErrLeaseNotFound), "renewing it: %v", renewed),
		must(errors.Is(late, rpctypes.ErrLeaseNotFound), "putting with it: %v", late),
	)
}

func leaseLives(ctx context.Context, s setting) error {
	lease, err := s.client.Grant(ctx, 2)
	if err != nil {
		return err
	}
	if _, err := s.client.Put(ctx, "alive", "x", clientv3.WithLease(lease.ID)); err != nil {
		return err
	}
	renewals, err := s.client.KeepAlive(ctx, lease.ID)
	if err != nil {
		return err
	}
	// Longer than the lease would last by itself, with a restart in the middle.
	for renewal := range 8 {
		if renewal == 4 {
			if err := s.restart(); err != nil {
				return fmt.Errorf("cannot restart the server: %w", err)
			}
		}
		answer, open := <-renewals
		if !open || answer.TTL != 2 {
			return fmt.Errorf("renewal %d is %v", renewal, answer)
		}
	}
	got, err := s.client.Get(ctx, "alive")
	if err != nil {
		return err
	}
	if _, err := s.client.Revoke(ctx, lease.ID); err != nil {
		return err
	}
	none, err := s.client.Get(ctx, "alive")
	return wrong(
		err,
		must(got.Count == 1, "the key of a lease that is kept alive is gone"),
		must(err != nil || none.Count == 0, "the key of a lease that was revoked is there"),
	)
}

// pair opens two sessions on clients of their own.
func pair(s setting) (one, other *concurrency.Session, err error) {
	if one, err = concurrency.NewSession(s.client, concurrency.WithTTL(10)); err != nil {
		return nil, nil, err
	}
	other, err = concurrency.NewSession(s.client, concurrency.WithTTL(10))
	return one, other, err
}

func mutex(ctx context.Context, s setting) error {
	one, other, err := pair(s)
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
	err = eventually(ctx, func() error {
		got, err := s.client.Get(ctx, "mutex/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			return err
		}
		return must(got.Count == 2, "there are %d keys", got.Count)
	})
	if err != nil {
		return err
	}
	select {
	case err := <-entered:
		return fmt.Errorf("two hold one mutex: %w", err)
	default:
	}
	owner, err := s.client.Txn(ctx).If(holder.IsOwner()).Commit()
	if err != nil {
		return err
	}
	// Closing the session lets go of the mutex with the lease.
	if err := one.Close(); err != nil {
		return err
	}
	return wrong(
		must(owner.Succeeded, "the holder is not the owner"),
		<-entered,
		waiter.Unlock(ctx),
	)
}

func election(ctx context.Context, s setting) error {
	one, other, err := pair(s)
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
		return must(open && string(got.Kvs[0].Value) == want, "%v is seen to lead and not %s", got, want)
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
		return fmt.Errorf("two lead: %w", err)
	default:
	}
	if err := leader.Resign(ctx); err != nil {
		return err
	}
	if err := wrong(<-elected, observed("other")); err != nil {
		return err
	}
	now, err := leader.Leader(ctx)
	if err != nil {
		return err
	}
	return wrong(
		must(string(now.Kvs[0].Value) == "other", "%v leads", now),
		must(errors.Is(leader.Proclaim(ctx, "x"), concurrency.ErrElectionNotLeader), "one who resigned proclaims"),
		candidate.Resign(ctx),
	)
}
