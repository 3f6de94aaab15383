// bbolt itself, for tests of our reader and writer of its files.
//
//	bbolt check FILE                 bbolt's own check, then what the file contains, as our check reports it
//	bbolt list FILE                  all entries
//	bbolt make FILE SEED PAGE_SIZE   makes a file in many transactions
//	bbolt empty FILE ORDER BATCH     deletes all keys, BATCH in a transaction; fills the file again; empties it again
//	bbolt bench FILE KEYS            how much processor time it takes to write so many small keys, and to read them
//
// It exits with 0, or prints what failed and exits with 1.
package main

import (
	"bufio"
	"fmt"
	"hash/fnv"
	"math/rand"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return fmt.Errorf("usage: bbolt check|list|make|empty|bench FILE …")
	}
	command, path, rest := args[0], args[1], args[2:]
	switch {
	case command == "check" && len(rest) == 0:
		return checkFile(path)
	case command == "list" && len(rest) == 0:
		return list(path)
	case command == "make" && len(rest) == 2:
		seed, err := strconv.ParseInt(rest[0], 10, 64)
		if err != nil {
			return err
		}
		pageSize, err := strconv.Atoi(rest[1])
		if err != nil {
			return err
		}
		return makeFile(path, seed, pageSize)
	case command == "empty" && len(rest) == 2:
		batch, err := strconv.Atoi(rest[1])
		if err != nil {
			return err
		}
		return empty(path, rest[0], batch)
	case command == "bench" && len(rest) == 1:
		keys, err := strconv.Atoi(rest[0])
		if err != nil {
			return err
		}
		return bench(path, keys)
	}
	return fmt.Errorf("unknown command %q", args)
}

// check returns the first problem that bbolt finds.
func check(tx *bolt.Tx) error {
	var first error
	for problem := range tx.Check() {
		if first == nil {
			first = problem
		}
	}
	return first
}

func openReadOnly(path string) (*bolt.DB, error) {
	return bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, PreLoadFreelist: true, Timeout: time.Second})
}

func checkFile(path string) error {
	db, err := openReadOnly(path)
	if err != nil {
		return err
	}
	defer db.Close()
	return db.View(func(tx *bolt.Tx) error {
		if err := check(tx); err != nil {
			return err
		}
		var stats bolt.BucketStats
		topLevel := 0
		err := tx.ForEach(func(_ []byte, bucket *bolt.Bucket) error {
			stats.Add(bucket.Stats())
			topLevel++
			return nil
		})
		if err != nil {
			return err
		}
		types, overflow := map[string]int{}, 0
		for id := 0; ; {
			page, err := tx.Page(id)
			if err != nil {
				return err
			}
			if page == nil {
				break
			}
			types[page.Type]++
			id++
			// A free page's header is what it was before, and that of the freelist does not count.
			switch page.Type {
			case "leaf", "branch":
				overflow += page.OverflowCount
				id += page.OverflowCount
			case "freelist":
				id += page.OverflowCount
			}
		}
		// bbolt counts nested buckets as keys, too.
		entries := stats.KeyN - (stats.BucketN - topLevel)
		fmt.Println("buckets", stats.BucketN, "inline", stats.InlineBucketN, "entries", entries,
			"branches", types["branch"], "leaves", types["leaf"], "overflow", overflow, "free", types["free"])
		return nil
	})
}

func list(path string) error {
	db, err := openReadOnly(path)
	if err != nil {
		return err
	}
	defer db.Close()
	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	return db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(name []byte, bucket *bolt.Bucket) error {
			return listBucket(out, 0, name, bucket)
		})
	})
}

func listBucket(out *bufio.Writer, depth int, name []byte, bucket *bolt.Bucket) error {
	fmt.Fprintf(out, "%d bucket %x %d\n", depth, name, bucket.Sequence())
	return bucket.ForEach(func(key, value []byte) error {
		if value == nil {
			return listBucket(out, depth+1, key, bucket.Bucket(key))
		}
		hash := fnv.New64a()
		hash.Write(value)
		fmt.Fprintf(out, "%d %x %d %x\n", depth+1, key, len(value), hash.Sum64())
		return nil
	})
}

// makeFile makes what our writer never writes: free pages, pages that are half empty, values that were replaced.
func makeFile(path string, seed int64, pageSize int) error {
	random := rand.New(rand.NewSource(seed))
	options := &bolt.Options{PageSize: pageSize, NoSync: true, NoFreelistSync: seed%3 == 2}
	if seed%2 == 1 {
		options.FreelistType = bolt.FreelistMapType
	}
	db, err := bolt.Open(path, 0o600, options)
	if err != nil {
		return err
	}
	defer db.Close()
	for step := range 60 {
		if err := db.Update(func(tx *bolt.Tx) error { return change(tx, random, step) }); err != nil {
			return err
		}
	}
	return db.View(check)
}

// change does some random changes in one transaction.
func change(tx *bolt.Tx, random *rand.Rand, step int) error {
	names := []string{"large", "plain", "small", "emptied", "nested", "long keys"}
	if step == 0 {
		for _, name := range append(names, "empty") {
			if _, err := tx.CreateBucket([]byte(name)); err != nil {
				return err
			}
		}
	}
	name := names[random.Intn(len(names))]
	bucket := tx.Bucket([]byte(name))
	if random.Intn(4) == 0 {
		if err := bucket.SetSequence(uint64(random.Int63())); err != nil {
			return err
		}
	}
	switch name {
	case "large":
		return putMany(bucket, random, 3, 20, 1<<(random.Intn(7)+12))
	case "small":
		return putMany(bucket, random, 2, 6, 20)
	case "long keys":
		return putMany(bucket, random, 5, 5000, 50)
	case "emptied":
		if err := putMany(bucket, random, 200, 20, 100); err != nil {
			return err
		}
		return deleteSome(bucket, func() bool { return true })
	case "nested":
		for range random.Intn(4) + 1 {
			var err error
			if bucket, err = bucket.CreateBucketIfNotExists([]byte{byte(random.Intn(6))}); err != nil {
				return err
			}
			if err := putMany(bucket, random, random.Intn(50), 20, 60); err != nil {
				return err
			}
		}
		return nil
	}
	if err := putMany(bucket, random, 400, 20, 120); err != nil {
		return err
	}
	return deleteSome(bucket, func() bool { return random.Intn(3) == 0 })
}

func putMany(bucket *bolt.Bucket, random *rand.Rand, count, keyLength, valueLength int) error {
	for range count {
		// Longer than a nested bucket's name, so that they differ.
		key, value := make([]byte, random.Intn(keyLength)+2), make([]byte, random.Intn(valueLength))
		random.Read(key)
		random.Read(value)
		if err := bucket.Put(key, value); err != nil {
			return err
		}
	}
	return nil
}

func deleteSome(bucket *bolt.Bucket, chosen func() bool) error {
	var keys [][]byte
	err := bucket.ForEach(func(key, value []byte) error {
		if value != nil && chosen() {
			keys = append(keys, slices.Clone(key))
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, key := range keys {
		if err := bucket.Delete(key); err != nil {
			return err
		}
	}
	return nil
}

// located is a key and the names of the buckets that it is in.
type located struct {
	path [][]byte
	key  []byte
}

func (key located) bucket(tx *bolt.Tx) *bolt.Bucket {
	bucket := tx.Bucket(key.path[0])
	for _, name := range key.path[1:] {
		bucket = bucket.Bucket(name)
	}
	return bucket
}

func empty(path, order string, batch int) error {
	db, err := bolt.Open(path, 0o600, &bolt.Options{NoSync: true, Timeout: time.Second})
	if err != nil {
		return err
	}
	defer db.Close()
	random := rand.New(rand.NewSource(int64(batch)))
	if err := emptyBuckets(db, random, order, batch); err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		return tx.ForEach(func(_ []byte, bucket *bolt.Bucket) error { return putMany(bucket, random, 300, 20, 200) })
	})
	if err != nil {
		return err
	}
	if err := db.View(check); err != nil {
		return fmt.Errorf("after filling it again: %w", err)
	}
	return emptyBuckets(db, random, "random", max(batch, 100))
}

// emptyBuckets deletes all keys and checks that none is left. The buckets remain.
func emptyBuckets(db *bolt.DB, random *rand.Rand, order string, batch int) error {
	keys, err := allKeys(db)
	if err != nil {
		return err
	}
	switch order {
	case "forward":
	case "backward":
		slices.Reverse(keys)
	case "random":
		random.Shuffle(len(keys), func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
	default:
		return fmt.Errorf("unknown order %q", order)
	}
	// Checks take longer than deletions: about ten are made.
	every := len(keys)/batch/10 + 1
	for step := 0; len(keys) > 0; step++ {
		now := keys[:min(batch, len(keys))]
		keys = keys[len(now):]
		err := db.Update(func(tx *bolt.Tx) error {
			for _, key := range now {
				if err := key.bucket(tx).Delete(key.key); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		if step%every == 0 || len(keys) == 0 {
			if err := db.View(check); err != nil {
				return fmt.Errorf("with %d keys left: %w", len(keys), err)
			}
		}
	}
	if keys, err = allKeys(db); err == nil && len(keys) > 0 {
		return fmt.Errorf("%d keys were not deleted", len(keys))
	}
	return err
}

func allKeys(db *bolt.DB) ([]located, error) {
	var keys []located
	var visit func(path [][]byte, bucket *bolt.Bucket) error
	visit = func(path [][]byte, bucket *bolt.Bucket) error {
		return bucket.ForEach(func(key, value []byte) error {
			if value == nil {
				return visit(append(slices.Clone(path), slices.Clone(key)), bucket.Bucket(key))
			}
			keys = append(keys, located{path, slices.Clone(key)})
			return nil
		})
	}
	err := db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(name []byte, bucket *bolt.Bucket) error {
			return visit([][]byte{slices.Clone(name)}, bucket)
		})
	})
	return keys, err
}

// processorTime is what all threads of this process have used.
func processorTime() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		panic(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func bench(path string, keys int) error {
	db, err := bolt.Open(path, 0o600, &bolt.Options{NoSync: true, NoFreelistSync: true, NoGrowSync: true})
	if err != nil {
		return err
	}
	defer db.Close()
	begin := processorTime()
	for next := 0; next < keys; {
		err := db.Update(func(tx *bolt.Tx) error {
			bucket, err := tx.CreateBucketIfNotExists([]byte("key"))
			if err != nil {
				return err
			}
			bucket.FillPercent = 0.9
			for end := min(next+10000, keys); next < end; next++ {
				if err := bucket.Put(fmt.Appendf(nil, "%017d", next), make([]byte, 64)); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	written := processorTime() - begin
	begin = processorTime()
	read := 0
	err = db.View(func(tx *bolt.Tx) error {
		return tx.Bucket([]byte("key")).ForEach(func(_, value []byte) error {
			read += len(value)
			return nil
		})
	})
	if err != nil {
		return err
	}
	iterated := processorTime() - begin
	begin = processorTime()
	if err := db.View(check); err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	fmt.Println("written in", written, "read", read, "bytes in", iterated, "checked in", processorTime()-begin, "file size", info.Size())
	return nil
}
