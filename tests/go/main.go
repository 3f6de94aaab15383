// A client of etcd as programs in the field are: the official Go library, version 3.7.3, against one server.
//
//	goclient ENDPOINT
//
// Now and then it writes the line "restart" and waits for a line: whoever started it kills the server in between and starts
// it again on the same data and address. It exits with 1 and says what was wrong, or with 0.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// patience is how long anything may take.
const patience = 30 * time.Second

// A setting is what every check needs.
type setting struct {
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
	s := setting{endpoint: os.Args[1], restart: func() error {
		fmt.Println("restart")
		_, err := answers.ReadString('\n')
		return err
	}}
	checks := []struct {
		name string
		run  func(context.Context, setting) error
	}{
		{"put, get and delete", keys},
		{"get with options", lists},
		{"get as a stream", streams},
		{"transactions", transactions},
		{"depths", depths},
		{"compaction", compaction},
		{"status and hash", maintenance},
		{"watch", watch},
		{"watch through a restart", watchResumes},
		{"watch of what was compacted", watchCompacted},
		{"lease that runs out", leaseEnds},
		{"lease kept alive through a restart", leaseLives},
		{"mutex", mutex},
		{"election", election},
	}
	for _, check := range checks {
		if err := alone(s, check.run); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", check.name, err)
			os.Exit(1)
		}
		fmt.Println("ok:", check.name)
	}
}

// alone runs a check with a client of its own on an empty key space.
func alone(s setting, check func(context.Context, setting) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	client, err := clientv3.New(clientv3.Config{
		Endpoints:   []string{s.endpoint},
		DialTimeout: patience,
		Logger:      zap.NewNop(), // What it retries is its own affair.
	})
	if err != nil {
		return err
	}
	defer client.Close()
	if _, err := client.Delete(ctx, "", clientv3.WithFromKey()); err != nil {
		return fmt.Errorf("cannot empty the key space: %w", err)
	}
	s.client = client
	return check(ctx, s)
}

// must tells what went wrong unless it is as it has to be.
func must(is bool, format string, args ...any) error {
	if is {
		return nil
	}
	return fmt.Errorf(format, args...)
}

// wrong joins what several checks found.
func wrong(found ...error) error { return errors.Join(found...) }
