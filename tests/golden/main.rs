//! Golden scripts: commands and what they come to, recorded, read and kept.
//!
//! Every command runs on two state machines, one over [`metastore::storage::memory::Memory`] and one over
//! [`metastore::storage::rocks::Rocks`]. Their answers, and all that the two databases hold, must be equal after each
//! command; then the answer is shown once. To record a new script, leave out what follows `---` and run the tests with
//! `UPDATE_GOLDENFILES=1`; then read what it wrote.
//!
//! Commands that become entries (a `\0` in a word is a zero byte):
//!
//! | command | meaning |
//! | --- | --- |
//! | `put key=value [lease=] [prev_kv] [ignore_value] [ignore_lease]` | a Put; with `ignore_value` just `put key` |
//! | `delete key [end] [prev_kv]` | a DeleteRange |
//! | `> txn if version(a)=1 and mod(a..c)>2 { put a=1; get a } else { … }` | a Txn; operations may be transactions again |
//! | `fill n` | n Puts: `k0000=0`, `k0001=1` and so on; shows only the last |
//! | `compact rev [physical]` | a Compact; `physical` also removes |
//! | `grant id ttl=`, `revoke id` | leases |
//! | `alarm list\|raise\|clear [nospace\|corrupt\|number] [member=]` | alarms |
//! | `member add id url … [learner] [max_learners=]` | a new member |
//! | `member remove id`, `member promote id`, `member update id url …` | changes of a member |
//! | `member attributes id name= [url …]` | what a member says of itself |
//! | … `misfiled` | the same in an entry of the wrong kind: raft is told of what it need not know, or not of what it must |
//! | `foreign`, `garbage` | an entry of a later version; one that is none |
//!
//! And beside the log:
//!
//! | command | meaning |
//! | --- | --- |
//! | `get key [end] [rev=] [limit=] [sort=] [by=] [min_mod=] … [keys_only] [count_only]` | a Range of what is published |
//! | `view [rev=]`, `look key [end] …`, `close` | holds a view, reads through it, lets it go |
//! | `hash [rev]` | `HashKV` |
//! | `remember` | remembers the hash of what is about to be removed |
//! | `remove [limit=]` | removes what was compacted: one piece of so many records, or all |
//! | `members` | who votes, who learns, who was removed |
//! | `records [raw]`, `leases` | what is stored; `raw` byte for byte |
//! | `batch`, `commit` | entries in between gather into one batch |
//! | `flush`, `restart` | the database flushes; everything is opened again |
//! | `crash lose=n` | the newest n batches are lost; what was lost is replayed, and must come to the same |
//!
//! And those who watch. Each names its stream with `stream=` unless there is but one; the first of a stream opens it, with
//! `parts=` for how many bytes are split where that is wished for. What a stream hears is shown by commands that ask for
//! something and by `hear`: `2*a=1` created a key at revision 2, `3+a=2` changed it, `4-a` deleted it, each followed by what
//! was there before (`<1@2`) where that was asked for; then `…` for a part that is not the last, and the header's revision.
//!
//! | command | meaning |
//! | --- | --- |
//! | `watch key [end] [from=] [id=] [prev_kv] [notify] [fragment] [no_put] [no_delete]` | begins a watch |
//! | `cancel id`, `progress` | ends it; asks how far everything was said |
//! | `hear` | what there is to hear |
//! | `stall`, `listen` | the client takes nothing; it takes everything again |
//! | `leave` | closes the stream |
//! | `wait seconds` | time passes |
//! | `hub [ring=] [pending=] [watches=]` | begins with a hub that has so many bytes for events; closes all streams |
//! | `counts` | streams, watches, those that lag, events that wait |

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../watching/client.rs"]
mod client;
mod language;
mod node;
mod print;
mod watching;

use std::{env, error::Error, fs, path::Path};

use goldenscript::{Argument, Command, Context, Runner};
use language::Words;
use node::{Node, Place};

/// Two machines that do everything alike.
struct Mirror {
    memory: Node,
    rocks: Node,
}

impl Mirror {
    fn new() -> Self {
        Self { memory: Node::new(Place::memory()), rocks: Node::new(Place::rocks()) }
    }

    fn crash(&mut self, words: &mut Words) -> Result<String, Box<dyn Error>> {
        let found = self.memory.crash(usize::try_from(words.number("lose")?)?)?;
        self.rocks.adopt(&found);
        let (first, second) = (self.memory.start_after_crash(), self.rocks.start_after_crash());
        assert_eq!(first, second, "memory and RocksDB find the same");
        Ok(first)
    }
}

impl Runner for Mirror {
    type Command = Command;

    fn run(&mut self, command: &Command, _: &Context) -> Result<String, Box<dyn Error>> {
        let words = || {
            Words::new(command.args.iter().map(|argument| match argument {
                Argument::KeyValue(name, value) => (Some(name.clone()), value.clone()),
                Argument::Positional(value) => (None, value.clone()),
                other => panic!("what is {other}?"),
            }))
        };
        let output = if command.name == "crash" {
            self.crash(&mut words())?
        } else if let Some(text) = command.name.strip_prefix("txn ") {
            let (first, second) = (self.memory.txn(text)?, self.rocks.txn(text)?);
            assert_eq!(first, second, "memory and RocksDB answer alike");
            first
        } else {
            let first = self.memory.run(&command.name, words())?;
            assert_eq!(first, self.rocks.run(&command.name, words())?, "memory and RocksDB answer alike");
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

/// Shows where a script's output begins to differ from what was recorded.
fn check(script: &Path, recorded: &str, output: &str) {
    let mut lines = recorded.lines().zip(output.lines()).enumerate();
    if let Some((nth, (was, is))) = lines.find(|(_, (was, is))| was != is) {
        panic!("{}:{}\n  recorded: {was}\n  now:      {is}", script.display(), nth + 1);
    }
    assert_eq!(recorded, output, "{}", script.display());
}

#[test]
fn keys_live_and_die_as_the_mvcc_scripts_say() {
    run_all("mvcc");
}

#[test]
fn transactions_come_to_what_the_txn_scripts_say() {
    run_all("txn");
}

#[test]
fn leases_and_alarms_act_as_the_lease_scripts_say() {
    run_all("lease");
}

#[test]
fn members_come_and_go_as_the_member_scripts_say() {
    run_all("members");
}

#[test]
fn watchers_hear_what_the_watch_scripts_say() {
    run_all("watch");
}
