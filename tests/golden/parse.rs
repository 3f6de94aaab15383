//! Parses the commands of scripts into requests.

use std::error::Error;

use bytes::Bytes;
use metastore::proto::etcdserverpb::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, compare::TargetUnion, request_op,
};

type Parsed<T> = Result<T, Box<dyn Error>>;

/// Words that are flags.
const FLAGS: [&str; 13] = [
    "prev_kv",
    "ignore_value",
    "ignore_lease",
    "keys_only",
    "count_only",
    "physical",
    "raw",
    "learner",
    "misfiled",
    "notify",
    "fragment",
    "no_put",
    "no_delete",
];

/// The arguments of a command: plain words, `name=value` pairs and flags, each in order.
#[derive(Debug, Default)]
pub struct Args {
    plain: Vec<String>,
    pairs: Vec<(String, String)>,
    flags: Vec<String>,
}

impl Args {
    pub fn new(words: impl IntoIterator<Item = (Option<String>, String)>) -> Self {
        let mut sorted = Self::default();
        for (name, value) in words {
            match name {
                Some(name) => sorted.pairs.push((name, value)),
                None if FLAGS.contains(&value.as_str()) => sorted.flags.push(value),
                None => sorted.plain.push(value),
            }
        }
        sorted
    }

    fn of_text(words: &[String]) -> Self {
        Self::new(words.iter().map(|word| match word.split_once('=') {
            Some((name, value)) => (Some(name.to_owned()), value.to_owned()),
            None => (None, word.clone()),
        }))
    }

    pub fn flag(&mut self, name: &str) -> bool {
        let before = self.flags.len();
        self.flags.retain(|flag| flag != name);
        self.flags.len() < before
    }

    /// The number of a `name=value` pair; zero if it is not given.
    pub fn number(&mut self, name: &str) -> Parsed<i64> {
        Ok(self.option(name).map(|text| number(&text)).transpose()?.unwrap_or(0))
    }

    pub fn option(&mut self, name: &str) -> Option<String> {
        let at = self.pairs.iter().position(|(pair, _)| pair == name)?;
        Some(self.pairs.remove(at).1)
    }

    /// The next plain word.
    pub fn word(&mut self) -> Option<String> {
        (!self.plain.is_empty()).then(|| self.plain.remove(0))
    }

    pub fn expect_number(&mut self) -> Parsed<i64> {
        number(&self.word().ok_or("a number is missing")?)
    }

    /// Fails if any arguments were not consumed.
    pub fn finish(self) -> Parsed<()> {
        let left = self.plain.len() + self.pairs.len() + self.flags.len();
        if left > 0 { Err(format!("unknown arguments: {self:?}").into()) } else { Ok(()) }
    }
}

/// Parses a decimal number, or a hexadecimal one that starts with `0x`.
pub fn number(text: &str) -> Parsed<i64> {
    match text.strip_prefix("0x") {
        Some(digits) => Ok(u64::from_str_radix(digits, 16)?.cast_signed()),
        None => Ok(text.parse()?),
    }
}

/// The bytes of a word, in which `\0` stands for a zero byte.
pub fn bytes(text: &str) -> Bytes {
    text.replace("\\0", "\0").into_bytes().into()
}

pub fn range(args: &mut Args) -> Parsed<RangeRequest> {
    let (key, range_end) = (args.word().unwrap_or_default(), args.word().unwrap_or_default());
    let sort_order = match args.option("sort").as_deref() {
        None => 0,
        Some("ascend") => 1,
        Some("descend") => 2,
        Some(other) => return Err(format!("no such order: {other}").into()),
    };
    let targets = ["key", "version", "create", "mod", "value"];
    let sort_target = match args.option("by") {
        None => 0,
        Some(by) => targets.iter().position(|target| *target == by).ok_or("no such sort target")?,
    };
    Ok(RangeRequest {
        key: bytes(&key),
        range_end: bytes(&range_end),
        limit: args.number("limit")?,
        revision: args.number("rev")?,
        sort_order,
        sort_target: i32::try_from(sort_target)?,
        serializable: false,
        keys_only: args.flag("keys_only"),
        count_only: args.flag("count_only"),
        min_mod_revision: args.number("min_mod")?,
        max_mod_revision: args.number("max_mod")?,
        min_create_revision: args.number("min_create")?,
        max_create_revision: args.number("max_create")?,
    })
}

pub fn put(args: &mut Args) -> Parsed<PutRequest> {
    let lease = args.number("lease")?;
    let flags = [args.flag("prev_kv"), args.flag("ignore_value"), args.flag("ignore_lease")];
    let [prev_kv, ignore_value, ignore_lease] = flags;
    let (key, value) = match (args.pairs.is_empty(), args.word()) {
        (true, Some(key)) => (key, String::new()),
        (false, None) => args.pairs.remove(0),
        _ => return Err("a put is `put key=value`".into()),
    };
    Ok(PutRequest { key: bytes(&key), value: bytes(&value), lease, prev_kv, ignore_value, ignore_lease })
}

pub fn delete(args: &mut Args) -> DeleteRangeRequest {
    let (key, range_end) = (args.word().unwrap_or_default(), args.word().unwrap_or_default());
    DeleteRangeRequest { key: bytes(&key), range_end: bytes(&range_end), prev_kv: args.flag("prev_kv") }
}

/// Parses `if COMPARE and COMPARE { OP; OP } else { OP }`, where an operation may be a nested transaction. `if true` has no
/// comparisons.
pub fn txn(text: &str) -> Parsed<TxnRequest> {
    let spaced = ["{", "}", ";"].iter().fold(text.to_owned(), |text, sign| text.replace(sign, &format!(" {sign} ")));
    let mut words: Vec<String> = spaced.split_whitespace().rev().map(str::to_owned).collect();
    let txn = read_txn(&mut words)?;
    if words.is_empty() { Ok(txn) } else { Err(format!("unexpected words after the transaction: {words:?}").into()) }
}

/// `words` is in reverse order, so that the next word can be popped.
fn read_txn(words: &mut Vec<String>) -> Parsed<TxnRequest> {
    expect(words, "if")?;
    let mut txn = TxnRequest::default();
    loop {
        let word = words.pop().ok_or("a transaction needs a branch")?;
        match word.as_str() {
            "{" => break,
            "and" | "true" => (),
            _ => txn.compare.push(compare(&word)?),
        }
    }
    txn.success = read_branch(words)?;
    if words.last().is_some_and(|word| word == "else") {
        words.pop();
        expect(words, "{")?;
        txn.failure = read_branch(words)?;
    }
    Ok(txn)
}

fn expect(words: &mut Vec<String>, wanted: &str) -> Parsed<()> {
    match words.pop() {
        Some(word) if word == wanted => Ok(()),
        other => Err(format!("expected {wanted}, found {other:?}").into()),
    }
}

fn read_branch(words: &mut Vec<String>) -> Parsed<Vec<RequestOp>> {
    let mut ops = Vec::new();
    let mut op = Vec::new();
    loop {
        if op.is_empty() && words.last().is_some_and(|word| word == "if") {
            ops.push(RequestOp { request: Some(request_op::Request::RequestTxn(read_txn(words)?)) });
            continue;
        }
        let word = words.pop().ok_or("a branch is not closed")?;
        match word.as_str() {
            ";" | "}" => {
                if !op.is_empty() {
                    ops.push(read_op(&std::mem::take(&mut op))?);
                }
                if word == "}" {
                    return Ok(ops);
                }
            }
            _ => op.push(word),
        }
    }
}

fn read_op(words: &[String]) -> Parsed<RequestOp> {
    let mut rest = Args::of_text(&words[1..]);
    let request = match words[0].as_str() {
        "get" => Some(request_op::Request::RequestRange(range(&mut rest)?)),
        "put" => Some(request_op::Request::RequestPut(put(&mut rest)?)),
        "delete" => Some(request_op::Request::RequestDeleteRange(delete(&mut rest))),
        "nothing" => None,
        other => return Err(format!("no such operation: {other}").into()),
    };
    rest.finish()?;
    Ok(RequestOp { request })
}

/// Parses `target(key)=operand` or `target(key..end)>operand`. A target `#9` and the operator `~` are unknown ones, and
/// `version(key)=mod:3` has the operand of another target.
fn compare(word: &str) -> Parsed<Compare> {
    let (target, rest) = word.split_once('(').ok_or("a comparison is `target(key)=operand`")?;
    let (keys, rest) = rest.split_once(')').ok_or("a comparison is `target(key)=operand`")?;
    let (key, range_end) = keys.split_once("..").unwrap_or((keys, ""));
    let operators = [("!=", 3), ("=", 0), (">", 1), ("<", 2), ("~", 9)];
    let found = operators.iter().find_map(|&(sign, result)| Some((rest.strip_prefix(sign)?, result)));
    let (operand, result) = found.ok_or_else(|| format!("no such operator: {rest}"))?;
    let targets = ["version", "create", "mod", "value", "lease"];
    let number_of = |name: &str| targets.iter().position(|target| *target == name);
    let target_number = match target.strip_prefix('#') {
        Some(unknown) => unknown.parse()?,
        None => i32::try_from(number_of(target).ok_or("no such target")?)?,
    };
    let (kind, operand) = operand.split_once(':').unwrap_or((target, operand));
    let target_union = match kind {
        "version" => Some(TargetUnion::Version(number(operand)?)),
        "create" => Some(TargetUnion::CreateRevision(number(operand)?)),
        "mod" => Some(TargetUnion::ModRevision(number(operand)?)),
        "value" => Some(TargetUnion::Value(bytes(operand))),
        "lease" => Some(TargetUnion::Lease(number(operand)?)),
        _ => None,
    };
    Ok(Compare { result, target: target_number, key: bytes(key), target_union, range_end: bytes(range_end) })
}
