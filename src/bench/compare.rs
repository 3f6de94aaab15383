//! Two servers side by side: medians of several rounds, and ratios, as Markdown.
//!
//! Each file has one JSON object a line. A line with `operations` is a report of this generator, and its `label` names
//! its row. Other lines are single figures, `{"label":"disk","value":760,"unit":"MB"}`. Lines of the same label are rounds.

use std::{collections::BTreeMap, fmt::Write, fs, path::Path};

use serde_json::Value;

use super::{
    arguments::CompareArgs,
    report::{thousands, three_digits},
};

/// The figures of one server: row → rounds, and the rows in the order in which they first came.
#[derive(Debug, Default)]
struct Side {
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

/// The tables.
pub(super) fn table(arguments: &CompareArgs) -> Result<String, String> {
    Ok(render(&read(&arguments.theirs)?, &read(&arguments.ours)?))
}

fn read(path: &Path) -> Result<Side, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Side::parse(&text).map_err(|error| format!("{}: {error}", path.display()))
}

impl Side {
    fn parse(text: &str) -> Result<Self, String> {
        let mut side = Self::default();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let value: Value = serde_json::from_str(line).map_err(|error| format!("line {}: {error}", number + 1))?;
            side.take(&value)
                .ok_or_else(|| format!("line {} is neither a report nor a figure with a label", number + 1))?;
        }
        Ok(side)
    }

    fn take(&mut self, line: &Value) -> Option<()> {
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

/// The rows of both, in the order of whichever has them first.
fn rows<'a>(theirs: &'a Side, ours: &'a Side) -> Vec<&'a String> {
    let ours_alone = ours.order.iter().filter(|label| !theirs.order.contains(label));
    theirs.order.iter().chain(ours_alone).collect()
}

fn render(theirs: &Side, ours: &Side) -> String {
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
        write!(row, "| {} → {} | {} ", number(their), number(our), ratio(their, our)).expect("a string takes all");
    }
    let (their, our) = pair(&|run| run.generator);
    let failed: u64 = theirs.iter().chain(ours).map(|run| run.failed).sum();
    writeln!(row, "| {} → {} | {failed} |", number(their), number(our)).expect("a string takes all");
    row
}

fn figure_row(label: &str, theirs: &Side, ours: &Side) -> String {
    let middle = |side: &Side| side.figures.get(label).and_then(|figures| median(figures.values.iter().copied()));
    let unit = [theirs, ours].iter().find_map(|side| side.figures.get(label)).map_or("", |figures| &figures.unit);
    let (their, our) = (middle(theirs), middle(ours));
    format!("| {label} | {} → {} {unit} | {} |\n", number(their), number(our), ratio(their, our))
}

/// The middle one; of an even number, the mean of the two in the middle.
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

/// Ours by theirs.
fn ratio(theirs: Option<f64>, ours: Option<f64>) -> String {
    match (theirs, ours) {
        (Some(theirs), Some(ours)) if theirs > 0.0 => format!("**{:.2}**", ours / theirs),
        _ => "–".to_owned(),
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "figures are positive and not astronomic")]
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
    fn the_median_is_the_middle_one() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.5));
        assert_eq!(median([7.0].into_iter()), Some(7.0));
        assert_eq!(median(std::iter::empty()), None);
    }

    #[test]
    fn a_ratio_is_ours_by_theirs_where_both_exist() {
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
        let table = render(&Side::parse(&theirs.concat()).unwrap(), &Side::parse(&ours.concat()).unwrap());
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
    fn a_line_that_says_nothing_is_refused_by_number() {
        assert!(Side::parse("\n{\"label\":\"x\"}\n").unwrap_err().starts_with("line 2 "));
        assert!(Side::parse("{\"operations\":1}").unwrap_err().contains("label"));
        assert!(Side::parse("not json").unwrap_err().starts_with("line 1: "));
    }
}
