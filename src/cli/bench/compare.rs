//! Compares two servers: medians of several rounds, and ratios, as Markdown.
//!
//! Each file has one JSON object per line. A line with `operations` is a report of this load generator, and its `label` names
//! the row. Other lines are single figures, `{"label":"disk","value":760,"unit":"MB"}`. Lines with the same label are rounds.

use std::{collections::BTreeMap, fmt::Write, fs, path::Path};

use serde_json::Value;

use super::{
    arguments::CompareArgs,
    report::{thousands, three_digits},
};

/// The results of one server: the rounds of each row, and the rows in order of their first appearance.
#[derive(Debug, Default)]
struct Results {
    order: Vec<String>,
    runs: BTreeMap<String, Vec<Run>>,
    figures: BTreeMap<String, Figures>,
}

/// One round of a workload.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// Server CPU per operation, µs.
    cpu: Option<f64>,
    per_second: f64,
    p50: f64,
    p99: f64,
    /// Generator CPU per operation, µs.
    generator: Option<f64>,
    failed: u64,
}

/// The rounds of a single figure.
#[derive(Debug, Default)]
struct Figures {
    unit: String,
    values: Vec<f64>,
}

pub(super) fn table(arguments: &CompareArgs) -> Result<String, String> {
    Ok(render(&read(&arguments.theirs)?, &read(&arguments.ours)?))
}

fn read(path: &Path) -> Result<Results, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Results::parse(&text).map_err(|error| format!("{}: {error}", path.display()))
}

impl Results {
    fn parse(text: &str) -> Result<Self, String> {
        let mut results = Self::default();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let value: Value = serde_json::from_str(line).map_err(|error| format!("line {}: {error}", number + 1))?;
            results
                .add(&value)
                .ok_or_else(|| format!("line {} is neither a report nor a figure with a label", number + 1))?;
        }
        Ok(results)
    }

    /// Adds one line; None if it is neither a report nor a figure.
    fn add(&mut self, line: &Value) -> Option<()> {
        let label = line["label"].as_str()?.to_owned();
        if !self.order.contains(&label) {
            self.order.push(label.clone());
        }
        if line.get("operations").is_some() {
            let run = Run {
                cpu: line["server"]["cpu_us_per_operation"].as_f64(),
                per_second: line["operations_per_second"].as_f64()?,
                p50: line["latency_us"]["p50"].as_f64()?,
                p99: line["latency_us"]["p99"].as_f64()?,
                generator: line["generator"]["cpu_us_per_operation"].as_f64(),
                failed: line["failed"].as_u64()?,
            };
            self.runs.entry(label).or_default().push(run);
        } else {
            let figures = self.figures.entry(label).or_default();
            line["unit"].as_str()?.clone_into(&mut figures.unit);
            figures.values.push(line["value"].as_f64()?);
        }
        Some(())
    }

    fn runs(&self, label: &str) -> &[Run] {
        self.runs.get(label).map_or(&[], Vec::as_slice)
    }
}

/// The rows of both: those of `theirs` in their order, then those that only `ours` has.
fn rows<'a>(theirs: &'a Results, ours: &'a Results) -> Vec<&'a String> {
    let only_ours = ours.order.iter().filter(|label| !theirs.order.contains(label));
    theirs.order.iter().chain(only_ours).collect()
}

fn render(theirs: &Results, ours: &Results) -> String {
    let mut text = String::new();
    let rows = rows(theirs, ours);
    let has_runs = |label: &&&String| !theirs.runs(label).is_empty() || !ours.runs(label).is_empty();
    let has_figures = |label: &&&String| theirs.figures.contains_key(**label) || ours.figures.contains_key(**label);
    let runs: Vec<_> =
        rows.iter().filter(has_runs).map(|label| run_row(label, theirs.runs(label), ours.runs(label))).collect();
    if !runs.is_empty() {
        text.push_str(
            "| work | server CPU µs/op | ratio | ops/s | ratio | p50 ms | ratio | p99 ms | ratio | generator CPU µs/op | failed |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
        );
        text.extend(runs);
    }
    let figures: Vec<_> = rows.iter().filter(has_figures).map(|label| figure_row(label, theirs, ours)).collect();
    if !figures.is_empty() {
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str("| figure | etcd → metastore | ratio |\n| --- | --- | --- |\n");
        text.extend(figures);
    }
    text
}

fn run_row(label: &str, theirs: &[Run], ours: &[Run]) -> String {
    let pair = |figure: &dyn Fn(&Run) -> Option<f64>| {
        (median(theirs.iter().filter_map(figure)), median(ours.iter().filter_map(figure)))
    };
    let mut row = format!("| {label} ");
    let millis = |micros: f64| micros / 1e3;
    for (their, our) in [
        pair(&|run| run.cpu),
        pair(&|run| Some(run.per_second)),
        pair(&|run| Some(millis(run.p50))),
        pair(&|run| Some(millis(run.p99))),
    ] {
        write!(row, "| {} → {} | {} ", number(their), number(our), ratio(their, our))
            .expect("writing to a string cannot fail");
    }
    let (their, our) = pair(&|run| run.generator);
    let failed: u64 = theirs.iter().chain(ours).map(|run| run.failed).sum();
    writeln!(row, "| {} → {} | {failed} |", number(their), number(our)).expect("writing to a string cannot fail");
    row
}

fn figure_row(label: &str, theirs: &Results, ours: &Results) -> String {
    let middle =
        |results: &Results| results.figures.get(label).and_then(|figures| median(figures.values.iter().copied()));
    let unit = [theirs, ours].iter().find_map(|results| results.figures.get(label)).map_or("", |figures| &figures.unit);
    let (their, our) = (middle(theirs), middle(ours));
    format!("| {label} | {} → {} {unit} | {} |\n", number(their), number(our), ratio(their, our))
}

/// The middle value; for an even count, the mean of the two middle values.
fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.as_slice() {
        [] => None,
        odd if odd.len() % 2 == 1 => Some(odd[middle]),
        even => Some(f64::midpoint(even[middle - 1], even[middle])),
    }
}

/// Ours divided by theirs.
fn ratio(theirs: Option<f64>, ours: Option<f64>) -> String {
    match (theirs, ours) {
        (Some(theirs), Some(ours)) if theirs > 0.0 => format!("**{:.2}**", ours / theirs),
        _ => "–".to_owned(),
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "figures are positive and far below 2^64")]
fn number(figure: Option<f64>) -> String {
    match figure {
        None => "–".to_owned(),
        Some(large @ 1000.0..) => thousands(large.round() as u64),
        Some(small) => three_digits(small),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(label: &str, cpu: f64, per_second: f64) -> String {
        format!(
            "{{\"label\":\"{label}\",\"operations\":5,\"operations_per_second\":{per_second},\"failed\":0,\
             \"latency_us\":{{\"p50\":500.0,\"p99\":2000.0}},\"server\":{{\"cpu_us_per_operation\":{cpu}}},\
             \"generator\":{{\"cpu_us_per_operation\":9.0}}}}\n"
        )
    }

    #[test]
    fn the_median_is_the_middle_value() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.5));
        assert_eq!(median([7.0].into_iter()), Some(7.0));
        assert_eq!(median(std::iter::empty()), None);
    }

    #[test]
    fn a_ratio_is_ours_divided_by_theirs_if_both_exist() {
        assert_eq!(ratio(Some(60.0), Some(15.0)), "**0.25**");
        assert_eq!(ratio(Some(0.0), Some(15.0)), "–");
        assert_eq!(ratio(None, Some(15.0)), "–");
        assert_eq!(ratio(Some(60.0), None), "–");
    }

    #[test]
    fn rounds_become_medians_and_rows_keep_their_order() {
        let theirs =
            [run("put-1", 60.0, 100.0), run("get-1", 40.0, 1.0), run("put-1", 80.0, 300.0), run("put-1", 70.0, 200.0)];
        let ours = [run("put-1", 35.0, 40_000.0), "{\"label\":\"disk\",\"value\":12.5,\"unit\":\"MB\"}\n".to_owned()];
        let table = render(&Results::parse(&theirs.concat()).unwrap(), &Results::parse(&ours.concat()).unwrap());
        let rows: Vec<_> = table.lines().collect();
        assert_eq!(
            rows[2],
            "| put-1 | 70.0 → 35.0 | **0.50** | 200 → 40,000 | **200.00** | 0.50 → 0.50 | **1.00** | 2.00 → 2.00 | **1.00** \
             | 9.00 → 9.00 | 0 |"
        );
        assert!(rows[3].starts_with("| get-1 | 40.0 → – | – |"), "{}", rows[3]);
        assert_eq!(rows[7], "| disk | – → 12.5 MB | – |");
    }

    #[test]
    fn an_invalid_line_is_refused_with_its_number() {
        assert!(Results::parse("\n{\"label\":\"x\"}\n").unwrap_err().starts_with("line 2 "));
        assert!(Results::parse("{\"operations\":1}").unwrap_err().contains("label"));
        assert!(Results::parse("not json").unwrap_err().starts_with("line 1: "));
    }
}
