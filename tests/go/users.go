package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// loggedIn returns a client that logs in with a password.
func loggedIn(env testEnv, name, password string) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints:   []string{env.endpoint},
		DialTimeout: timeout,
		Username:    name,
		Password:    password,
		Logger:      zap.NewNop(),
	})
}

// withUsers runs a check while authentication is enabled, and removes all users afterwards. There are root and ann: she
// reads below r/ and both reads and writes below w/.
func withUsers(ctx context.Context, env testEnv, check func(root, ann *clientv3.Client) error) error {
	all := func(prefix string) string { return clientv3.GetPrefixRangeEnd(prefix) }
	read, readWrite := clientv3.PermissionType(clientv3.PermRead), clientv3.PermissionType(clientv3.PermReadWrite)
	steps := []func() error{
		func() error { _, err := env.client.UserAdd(ctx, "root", "rootpw"); return err },
		func() error { _, err := env.client.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := env.client.RoleAdd(ctx, "reader"); return err },
		func() error {
			_, err := env.client.RoleGrantPermission(ctx, "reader", "r/", all("r/"), read)
			return err
		},
		func() error {
			_, err := env.client.RoleGrantPermission(ctx, "reader", "w/", all("w/"), readWrite)
			return err
		},
		func() error { _, err := env.client.UserAdd(ctx, "ann", "annpw"); return err },
		func() error { _, err := env.client.UserGrantRole(ctx, "ann", "reader"); return err },
		func() error { _, err := env.client.AuthEnable(ctx); return err },
	}
	// etcd's library grants the role root only if there is one.
	if _, err := env.client.RoleAdd(ctx, "root"); err != nil {
		return err
	}
	for n, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("step %d: %w", n, err)
		}
	}
	root, err := loggedIn(env, "root", "rootpw")
	if err != nil {
		return err
	}
	defer root.Close()
	ann, err := loggedIn(env, "ann", "annpw")
	if err != nil {
		return err
	}
	defer ann.Close()
	if err := check(root, ann); err != nil {
		return err
	}
	if _, err := root.AuthDisable(ctx); err != nil {
		return err
	}
	for _, name := range []string{"root", "ann"} {
		if _, err := env.client.UserDelete(ctx, name); err != nil {
			return err
		}
	}
	for _, name := range []string{"root", "reader"} {
		if _, err := env.client.RoleDelete(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

func permissions(ctx context.Context, env testEnv) error {
	return withUsers(ctx, env, func(root, ann *clientv3.Client) error {
		if _, err := root.Put(ctx, "r/1", "x"); err != nil {
			return err
		}
		_, anonymous := env.client.Get(ctx, "r/1")
		_, wrong := loggedIn(env, "ann", "wrong")
		_, unknown := loggedIn(env, "bob", "annpw")
		got, err := ann.Get(ctx, "r/", clientv3.WithPrefix())
		if err != nil {
			return err
		}
		_, written := ann.Put(ctx, "w/1", "y")
		_, denied := ann.Put(ctx, "r/1", "y")
		_, beyond := ann.Get(ctx, "r/", clientv3.WithFromKey())
		_, txn := ann.Txn(ctx).Then(clientv3.OpGet("r/1"), clientv3.OpPut("r/1", "z")).Commit()
		_, administered := ann.UserAdd(ctx, "cid", "x")
		role, err := ann.RoleGet(ctx, "reader")
		if err != nil {
			return err
		}
		users, err := root.UserList(ctx)
		if err != nil {
			return err
		}
		slices.Sort(users.Users)
		return errors.Join(
			expectf(errors.Is(anonymous, rpctypes.ErrUserEmpty), "without a user: %v", anonymous),
			expectf(errors.Is(wrong, rpctypes.ErrAuthFailed), "a wrong password: %v", wrong),
			expectf(errors.Is(unknown, rpctypes.ErrAuthFailed), "an unknown user: %v", unknown),
			expectf(len(got.Kvs) == 1, "ann reads %v", got),
			written,
			expectf(errors.Is(denied, rpctypes.ErrPermissionDenied), "a put that is not allowed: %v", denied),
			expectf(errors.Is(beyond, rpctypes.ErrPermissionDenied), "a range beyond what is allowed: %v", beyond),
			expectf(errors.Is(txn, rpctypes.ErrPermissionDenied), "a transaction that also puts: %v", txn),
			expectf(errors.Is(administered, rpctypes.ErrPermissionDenied), "adding a user: %v", administered),
			expectf(len(role.Perm) == 2, "the role is %v", role),
			expectf(slices.Equal(users.Users, []string{"ann", "root"}), "the users are %v", users.Users),
		)
	})
}

// permissionsChange shows that a client notices: its requests are identified at the newest revision of users and roles.
func permissionsChange(ctx context.Context, env testEnv) error {
	return withUsers(ctx, env, func(root, ann *clientv3.Client) error {
		if _, err := ann.Put(ctx, "w/1", "x"); err != nil {
			return err
		}
		if _, err := root.RoleRevokePermission(ctx, "reader", "w/", clientv3.GetPrefixRangeEnd("w/")); err != nil {
			return err
		}
		_, revoked := ann.Put(ctx, "w/1", "y")
		if _, err := root.UserChangePassword(ctx, "ann", "new"); err != nil {
			return err
		}
		// The token has ended; the library logs in again, with a password that is no longer right.
		_, old := ann.Get(ctx, "r/1")
		again, err := loggedIn(env, "ann", "new")
		if err != nil {
			return err
		}
		defer again.Close()
		_, read := again.Get(ctx, "r/1")
		return errors.Join(
			expectf(errors.Is(revoked, rpctypes.ErrPermissionDenied), "a put after the permission was revoked: %v", revoked),
			expectf(errors.Is(old, rpctypes.ErrAuthFailed), "the old password: %v", old),
			read,
		)
	})
}

// usersThroughRestart shows that a client whose token the server has forgotten logs in again by itself.
func usersThroughRestart(ctx context.Context, env testEnv) error {
	return withUsers(ctx, env, func(root, ann *clientv3.Client) error {
		if _, err := ann.Put(ctx, "w/1", "x"); err != nil {
			return err
		}
		if err := env.restart(); err != nil {
			return err
		}
		for {
			_, err := ann.Put(ctx, "w/1", "y")
			if err == nil {
				break
			}
			// The connection breaks with the server.
			if ctx.Err() != nil || errors.Is(err, rpctypes.ErrInvalidAuthToken) {
				return fmt.Errorf("after a restart: %w", err)
			}
			time.Sleep(50 * time.Millisecond)
		}
		_, err := root.Put(ctx, "x", "y")
		return err
	})
}

// sessionsOfUsers watches, keeps leases alive and locks as a user.
func sessionsOfUsers(ctx context.Context, env testEnv) error {
	return withUsers(ctx, env, func(root, ann *clientv3.Client) error {
		events := ann.Watch(ctx, "w/", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
		if created := <-events; created.Err() != nil {
			return created.Err()
		}
		if _, err := root.Put(ctx, "w/1", "x"); err != nil {
			return err
		}
		if err := expectEvents(ctx, events, "+w/1=x"); err != nil {
			return err
		}
		denied, open := <-ann.Watch(ctx, "secret")
		if err := expectf(open && denied.Canceled && strings.Contains(denied.Err().Error(), rpctypes.ErrPermissionDenied.Error()), "a watch that is not allowed: %v", denied.Err()); err != nil {
			return err
		}
		lease, err := root.Grant(ctx, 60)
		if err != nil {
			return err
		}
		if _, err := root.Put(ctx, "secret", "x", clientv3.WithLease(lease.ID)); err != nil {
			return err
		}
		_, revoked := ann.Revoke(ctx, lease.ID)
		session, err := concurrency.NewSession(ann, concurrency.WithTTL(10))
		if err != nil {
			return err
		}
		defer session.Close()
		locked := concurrency.NewMutex(session, "w/lock")
		if err := locked.Lock(ctx); err != nil {
			return err
		}
		elsewhere := concurrency.NewMutex(session, "r/lock").Lock(ctx)
		return errors.Join(
			expectf(errors.Is(revoked, rpctypes.ErrPermissionDenied), "revoking a lease with a key of others: %v", revoked),
			expectf(errors.Is(elsewhere, rpctypes.ErrPermissionDenied), "a lock where she may only read: %v", elsewhere),
			locked.Unlock(ctx),
		)
	})
}
