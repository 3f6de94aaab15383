// A client that uses the official Go library of etcd, version 3.7.3, as real programs do, and checks one server.
//
//	goclient ENDPOINT
//
// When it needs a restart it prints the line "restart" and waits for a line: meanwhile the calling process kills the server
// and starts it again on the same data and address. It exits with 0, or prints what failed and exits with 1.
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// timeout limits each check.
const timeout = 30 * time.Second

// testEnv is what every check needs.
type testEnv struct {
	client   *clientv3.Client
	endpoint string
	restart  func() error // Kills the server and returns when it serves again.
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: goclient ENDPOINT")
		os.Exit(2)
	}
	answers := bufio.NewReader(os.Stdin)
	env := testEnv{endpoint: os.Args[1], restart: func() error {
		fmt.Println("restart")
		_, err := answers.ReadString('\n')
		return err
	}}
	checks := []struct {
		name string
		run  func(context.Context, testEnv) error
	}{
		{"put, get and delete", putGetDelete},
		{"get with options", getWithOptions},
		{"get as a stream", getStream},
		{"transactions", transactions},
		{"nested transactions", nestedTransactions},
		{"compaction", compaction},
		{"status and hash", maintenance},
		{"watch", watch},
		{"watch through a restart", watchResumes},
		{"watch from a compacted revision", watchCompacted},
		{"lease that expires", leaseExpires},
		{"lease kept alive through a restart", leaseKeptAlive},
		{"mutex", mutex},
		{"election", election},
		{"permissions", permissions},
		{"permissions that change", permissionsChange},
		{"users through a restart", usersThroughRestart},
		{"sessions of users", sessionsOfUsers},
	}
	for _, check := range checks {
		if err := runCheck(env, check.run); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", check.name, err)
			os.Exit(1)
		}
		fmt.Println("ok:", check.name)
	}
}

// runCheck runs a check with a client of its own on an empty key space.
func runCheck(env testEnv, check func(context.Context, testEnv) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	client, err := clientv3.New(clientv3.Config{
		Endpoints:   []string{env.endpoint},
		DialTimeout: timeout,
		Logger:      zap.NewNop(), // Its retries are of no interest.
	})
	if err != nil {
		return err
	}
	defer client.Close()
	if _, err := client.Delete(ctx, "", clientv3.WithFromKey()); err != nil {
		return fmt.Errorf("cannot empty the key space: %w", err)
	}
	env.client = client
	return check(ctx, env)
}

// expectf returns an error with this text unless the condition holds.
func expectf(holds bool, format string, args ...any) error {
	if holds {
		return nil
	}
	return fmt.Errorf(format, args...)
}
