//! The log lines of a process, read back from its log files. There is one test, because a process has one logger.

use std::{fs, thread};

use metastore::logging::{self, Format, Level, Notice, Output, Settings};
use serde_json::Value;
use tracing::{debug, error, info, warn};

/// A value that logs while it is being formatted. Neither line may be lost.
struct LogsWhileFormatted;

impl std::fmt::Display for LogsWhileFormatted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        Notice::new(Level::Warn, "from within").log();
        f.write_str("said")
    }
}

#[test]
fn every_line_is_one_json_object_in_zaps_form() {
    let dir = tempfile::tempdir().unwrap();
    let (one, other) = (dir.path().join("one.log"), dir.path().join("other.log"));
    fs::write(&one, "{\"msg\":\"from before\"}\n").unwrap();
    let outputs = vec![Output::File(one.clone()), Output::File(other.clone())];
    let settings = Settings { level: Level::Info, format: Format::Json, outputs, audit: None };
    logging::start(&settings).unwrap();

    let missing = Output::File(dir.path().join("missing/x"));
    let refused = logging::start(&Settings { outputs: vec![missing], ..settings }).unwrap_err();
    assert!(refused.starts_with("open sink \"") && refused.contains("missing/x: "), "{refused}");

    info!(target: "metastore::test", { "local-member-id" = %"8e9e05c52164694d", count = 3, good = true }, "ready {}", 1);
    let urls = logging::list(&["http://a:1", "http://b:2"]);
    warn!(target: "metastore::test", { "listen-client-urls" = urls.as_slice(), took = ?"x\ny" }, "serving");
    error!(target: "metastore::test", error = &std::io::Error::other("broken") as &dyn std::error::Error, "it broke");
    debug!(target: "metastore::test", "not at this level");
    info!(target: "h2::codec", "not of another crate");
    warn!(target: "h2::codec", "but its warnings");
    info!(target: "metastore::test", value = %LogsWhileFormatted, "outer");
    slog::info!(logging::raft_logger(), "became leader"; "term" => 2);
    thread::Builder::new().name("apply".into()).spawn(|| panic!("on {}", "purpose")).unwrap().join().unwrap_err();
    let _code = logging::fatal("discovery failed", "port in use");

    // Restores the default panic hook, so that the assertions below print their messages.
    drop(std::panic::take_hook());
    let text = fs::read_to_string(&one).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let messages: Vec<_> = lines.iter().map(|line| line["msg"].as_str().unwrap()).collect();
    assert_eq!(
        messages,
        [
            "from before",
            "ready 1",
            "serving",
            "it broke",
            "but its warnings",
            "from within",
            "outer",
            "became leader",
            "on purpose",
            "discovery failed"
        ]
    );
    let levels: Vec<_> = lines[1..].iter().map(|line| line["level"].as_str().unwrap()).collect();
    assert_eq!(levels, ["info", "warn", "error", "warn", "warn", "info", "info", "panic", "fatal"]);
    for line in &lines[1..] {
        assert_eq!(line["ts"].as_str().unwrap().len(), "2006-01-02T15:04:05.000000Z".len());
        let (file, number) = line["caller"].as_str().unwrap().rsplit_once(':').unwrap();
        assert!(file.ends_with("logging.rs") && number.parse::<u32>().unwrap() > 0, "{line}");
    }
    assert_eq!(lines[1]["local-member-id"], "8e9e05c52164694d");
    assert_eq!((&lines[1]["count"], &lines[1]["good"]), (&3.into(), &true.into()));
    assert_eq!(lines[2]["listen-client-urls"], serde_json::json!(["http://a:1", "http://b:2"]));
    assert_eq!(lines[2]["took"], "\"x\\ny\"");
    assert_eq!(lines[3]["error"], "broken");
    assert_eq!(lines[6]["value"], "said");
    assert_eq!((&lines[7]["logger"], &lines[7]["term"]), (&"raft".into(), &2.into()));
    assert_eq!(lines[8]["thread"], "apply");
    assert!(lines[8]["stacktrace"].as_str().unwrap().contains("logging"));
    assert_eq!(lines[9]["error"], "port in use");
    assert!(text.lines().nth(1).unwrap().starts_with("{\"level\":\"info\",\"ts\":\""), "zap's order");

    let copy = fs::read_to_string(other).unwrap();
    assert_eq!(text.split_once('\n').unwrap().1, copy, "every output has every line");
}
