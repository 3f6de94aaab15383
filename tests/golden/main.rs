//! Golden scripts: commands and their recorded output.
//!
//! Every command runs on two state machines, one with [`metastore::storage::memory::Memory`] and one with
//! [`metastore::storage::rocks::Rocks`]. Their outputs and the contents of the two databases must be equal after each command;
//! the output is recorded once. To record a new script, leave out the parts after `---` and run the tests with
//! `UPDATE_GOLDENFILES=1`; then review the result.
//!
//! Commands that become entries (a `\0` in a word is a zero byte):
//!
//! | command | meaning |
//! | --- | --- |
//! | `put key=value [lease=] [prev_kv] [ignore_value] [ignore_lease]` | a Put; with `ignore_value` just `put key` |
//! | `delete key [end] [prev_kv]` | a DeleteRange |
//! | `> txn if version(a)=1 and mod(a..c)>2 { put a=1; get a } else { … }` | a Txn; operations may be nested transactions |
//! | `fill n` | n Puts: `k0000=0`, `k0001=1` and so on; shows only the last output |
//! | `compact rev [physical]` | a Compact; with `physical` the records are removed too |
//! | `grant id ttl=`, `revoke id` | leases |
//! | `alarm list\|raise\|clear [nospace\|corrupt\|number] [member=]` | alarms |
//! | `member add id url … [learner] [max_learners=]` | adds a member |
//! | `member remove id`, `member promote id`, `member update id url …` | changes a member |
//! | `member attributes id name= [url …]` | publishes a member's name and client URLs |
//! | … `misfiled` | the same in an entry of the wrong kind: a configuration change instead of a normal one, or the reverse |
//! | `garbage` | an invalid entry |
//!
//! Commands that do not become entries:
//!
//! | command | meaning |
//! | --- | --- |
//! | `get key [end] [rev=] [limit=] [sort=] [by=] [min_mod=] … [keys_only] [count_only]` | a Range of the published state |
//! | `view [rev=]`, `read key [end] …`, `close` | opens a view, reads through it, closes it |
//! | `hash [rev]` | `HashKV` |
//! | `store_hash` | stores the hash for the compaction that is about to remove records |
//! | `remove [limit=]` | removes compacted records: one step of about `limit` records, or all |
//! | `members` | voters, learners and removed members |
//! | `records [raw]`, `leases` | the stored records or leases; `raw` shows bytes |
//! | `batch`, `commit` | entries in between are applied as one batch |
//! | `flush`, `restart` | flushes the database; stops and opens everything again |
//! | `crash lose=n` | the newest n batches are lost; their entries are replayed, and must have the same outcomes |
//!
//! Watch commands. Each names its stream with `stream=` unless there is only one; the first command of a stream opens it, with
//! `parts=` for the response size in bytes above which a fragmenting watch splits. Commands that send a request, and `receive`,
//! show the responses received by the stream: `2*a=1` created a key at revision 2, `3+a=2` changed it, `4-a` deleted it, each
//! followed by the previous value (`<1@2`) if it was requested; then `…` for a fragment that is not the last, and the header's
//! revision.
//!
//! | command | meaning |
//! | --- | --- |
//! | `watch key [end] [from=] [id=] [prev_kv] [notify] [fragment] [no_put] [no_delete]` | creates a watch |
//! | `cancel id`, `progress` | cancels it; requests a progress notification |
//! | `receive` | shows all responses that are ready |
//! | `stall`, `resume` | the client stops reading responses; it reads again |
//! | `leave` | closes the stream |
//! | `wait seconds` | advances the time |
//! | `hub [ring=] [pending=] [watches=]` | starts a new hub with the given limits; closes all streams |
//! | `counts` | the numbers of streams, watches, lagging watches and pending events |

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../watch/client.rs"]
mod client;
mod node;
mod parse;
mod print;
mod watch_streams;

use std::{env, error::Error, fs, path::Path};

use goldenscript::{Argument, Command, Context, Runner};
use node::{Node, TestEngine};
use parse::Args;

/// Two state machines that execute the same commands.
struct Mirror {
    memory: Node,
    rocks: Node,
}

impl Mirror {
    fn new() -> Self {
        Self { memory: Node::new(TestEngine::memory()), rocks: Node::new(TestEngine::rocks()) }
    }

    fn crash(&mut self, args: &mut Args) -> Result<String, Box<dyn Error>> {
        let found = self.memory.crash(usize::try_from(args.number("lose")?)?)?;
        self.rocks.load_from(&found);
        let (first, second) = (self.memory.start_after_crash(), self.rocks.start_after_crash());
        assert_eq!(first, second, "memory and RocksDB restore the same state");
        Ok(first)
    }
}

impl Runner for Mirror {
    type Command = Command;

    fn run(&mut self, command: &Command, _: &Context) -> Result<String, Box<dyn Error>> {
        let args = || {
            Args::new(command.args.iter().map(|argument| match argument {
                Argument::KeyValue(name, value) => (Some(name.clone()), value.clone()),
                Argument::Positional(value) => (None, value.clone()),
                other => panic!("unknown argument {other}"),
            }))
        };
        let output = if command.name == "crash" {
            self.crash(&mut args())?
        } else if let Some(text) = command.name.strip_prefix("txn ") {
            let (first, second) = (self.memory.txn(text)?, self.rocks.txn(text)?);
            assert_eq!(first, second, "memory and RocksDB give the same output");
            first
        } else {
            let first = self.memory.run(&command.name, args())?;
            assert_eq!(first, self.rocks.run(&command.name, args())?, "memory and RocksDB give the same output");
            first
        };
        assert_eq!(self.memory.content(), self.rocks.content(), "memory and RocksDB hold the same");
        Ok(output)
    }
}

/// Runs all scripts of a directory; the panic of one names it.
fn run_all(directory: &str) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(directory);
    let mut scripts: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    scripts.sort();
    assert!(!scripts.is_empty());
    let record = env::var_os("UPDATE_GOLDENFILES").is_some_and(|value| value == "1");
    for script in scripts {
        println!("running {}", script.display());
        let recorded = fs::read_to_string(&script).unwrap();
        let output = goldenscript::generate(&mut Mirror::new(), &recorded)
            .unwrap_or_else(|error| panic!("{}: {error}", script.display()));
        if record {
            fs::write(&script, output).unwrap();
        } else {
            check(&script, &recorded, &output);
        }
    }
}

/// Reports the first line of a script's output that differs from the recorded one.
fn check(script: &Path, recorded: &str, output: &str) {
    let mut lines = recorded.lines().zip(output.lines()).enumerate();
    if let Some((nth, (was, is))) = lines.find(|(_, (was, is))| was != is) {
        panic!("{}:{}\n  recorded: {was}\n  now:      {is}", script.display(), nth + 1);
    }
    assert_eq!(recorded, output, "{}", script.display());
}

#[test]
fn mvcc_scripts_produce_their_recorded_output() {
    run_all("mvcc");
}

#[test]
fn txn_scripts_produce_their_recorded_output() {
    run_all("txn");
}

#[test]
fn lease_scripts_produce_their_recorded_output() {
    run_all("lease");
}

#[test]
fn members_scripts_produce_their_recorded_output() {
    run_all("members");
}

#[test]
fn watch_scripts_produce_their_recorded_output() {
    run_all("watch");
}
