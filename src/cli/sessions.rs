//! `modelfs sessions`.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use serde_json::Value;

use super::Out;
use super::out::{printable, table};
use crate::control::{self, AccessRequest, Request};
use crate::error::Result;
use crate::units::parse_duration;

/// The daemon looks through /proc; retiring an object waits a quarter of a second before it wipes.
const WAIT: Duration = Duration::from_secs(60);

/// Show which processes have files of a mount open or mapped; shut one session out, or let it in again.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct SessionsArgs {
    /// Where it is mounted
    mountpoint: PathBuf,
    /// Refuse opens and reads of uid=N, pid=N, container=ID, pod=UID or cgroup=PATH
    #[arg(long, value_name = "SESSION", conflicts_with = "let_in")]
    shut_out: Option<String>,
    /// With --shut-out: for so long [default: until --let-in]
    #[arg(long = "for", value_name = "TIME", requires = "shut_out")]
    time: Option<String>,
    /// With --shut-out: take whole files that it has open past the daemon away from everyone, to be fetched anew
    #[arg(long, requires = "shut_out")]
    hard: bool,
    /// No longer refuse it, whether it was shut out or blocked after repeated denials (uid=N, container=ID, cgroup=PATH)
    #[arg(long, value_name = "SESSION")]
    let_in: Option<String>,
}

const EXAMPLES: &str = "\
Examples:
  modelfs sessions /mnt/models
  modelfs sessions /mnt/models --shut-out uid=1000 --for 10m
  modelfs sessions /mnt/models --shut-out pod=0f8fad5b-d9cb-469f-a165-70867728950e --hard
  modelfs sessions /mnt/models --let-in uid=1000

The kernel serves passthrough descriptors and maps, and what its page cache holds, without asking: a session that has them \
goes on reading those until --hard or `modelfs lock` takes them away from everyone. The answer names such processes.";

pub fn run(args: &SessionsArgs, out: &Out) -> Result<()> {
    let ask = |request| control::ask(&args.mountpoint, Request::Access(request), WAIT);
    if let Some(session) = &args.shut_out {
        let time = args.time.as_deref().map(parse_duration).transpose().map_err(|e| e.context("--for"))?;
        // A part of a second is a second: shut out too long rather than too short.
        let seconds = time.map(|time| time.as_secs() + u64::from(time.subsec_nanos() > 0));
        let done = ask(AccessRequest::ShutOut { session: session.clone(), seconds, hard: args.hard })?;
        return out.result(&done, || if out.quiet { String::new() } else { show_shut_out(&done) });
    }
    if let Some(session) = &args.let_in {
        let done = ask(AccessRequest::LetIn { session: session.clone() })?;
        let what = if done["was_shut_out"] == true { "let in" } else { "was not shut out" };
        return out.result(&done, || if out.quiet { String::new() } else { format!("{session}: {what}") });
    }
    let told = ask(AccessRequest::Sessions)?;
    out.result(&told, || show(&told))
}

fn show_shut_out(done: &Value) -> String {
    let number = |name: &str| done[name].as_u64().unwrap_or(0);
    let mut text = format!(
        "{} is shut out{}; {} open files refused",
        done["session"].as_str().unwrap_or("it"),
        done["seconds"].as_u64().map_or(String::new(), |seconds| format!(" for {seconds} s")),
        number("plain_handles_refused"),
    );
    if number("objects_retired") > 0 {
        text.push_str(&format!(", {} whole files taken away from everyone", number("objects_retired")));
    }
    let still: Vec<String> =
        done["still_reading_pids"].as_array().into_iter().flatten().map(Value::to_string).collect();
    if !still.is_empty() {
        text.push_str(&format!(
            "\nstill reading what they have open or mapped past the daemon: pid {}; {} takes it away from everyone",
            still.join(", "),
            if done["hard"] == true { "`modelfs lock`" } else { "--hard" }
        ));
    }
    text
}

fn show(told: &Value) -> String {
    let sessions = told["sessions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let text = |value: &Value| value.as_str().map_or_else(|| "-".to_string(), printable);
    let mut rows = Vec::new();
    for session in sessions {
        let place = match (&session["pod"], &session["container"]) {
            (Value::String(pod), _) => format!("pod {}", printable(pod)),
            (_, Value::String(id)) => format!("container {}", id.get(..12).unwrap_or(id)),
            _ => "-".into(),
        };
        for (number, file) in session["files"].as_array().into_iter().flatten().enumerate() {
            let first = number == 0;
            let cell = |value: String| if first { value } else { String::new() };
            let since =
                file["since"].as_u64().map_or("-".to_string(), |since| format!("{} s", now.saturating_sub(since)));
            let (opens, past) = (file["opens"].as_u64().unwrap_or(0), file["passthrough"].as_u64().unwrap_or(0));
            let mut how = Vec::new();
            if opens > past {
                how.push("open");
            }
            if past > 0 {
                how.push("passthrough");
            }
            if file["mapped"] == true {
                how.push("mapped");
            }
            if how.is_empty() {
                how.push("inherited");
            }
            let pid = match session["pid"].as_u64() {
                Some(0) | None => "?".to_string(),
                Some(pid) => pid.to_string(),
            };
            rows.push(vec![
                cell(pid),
                cell(session["uid"].as_u64().map_or("-".into(), |uid| uid.to_string())),
                cell(text(&session["command"])),
                cell(place.clone()),
                cell(if session["shut_out"] == true { "shut out".into() } else { String::new() }),
                since,
                how.join(" "),
                text(&file["path"]),
            ]);
        }
        if let Some(more) = session["more_files"].as_u64().filter(|more| *more > 0) {
            let mut row = vec![String::new(); 7];
            row.push(format!("and {more} more files"));
            rows.push(row);
        }
    }
    let mut shown = if rows.is_empty() {
        "nobody has a file of it open or mapped\n".to_string()
    } else {
        table(
            &["pid", "uid", "command", "where", "", "since", "how", "file"],
            &[true, true, false, false, false, true, false, false],
            &rows,
        )
    };
    for rule in told["shut_out"].as_array().into_iter().flatten() {
        let left =
            rule["seconds_left"].as_u64().map_or("until let in".to_string(), |left| format!("for {left} s more"));
        shown.push_str(&format!("shut out: {} {left}\n", text(&rule["session"])));
    }
    for block in told["blocked"].as_array().into_iter().flatten() {
        let (who, why) = (text(&block["session"]), text(&block["why"]));
        shown.push_str(&format!("blocked: {who} for {} s more, {why}\n", block["seconds_left"].as_u64().unwrap_or(0)));
    }
    shown
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sessions_are_shown_one_line_a_file_with_how_each_is_read() {
        let told = json!({
            "sessions": [{
                "pid": 7, "uid": 1000, "command": "python3", "container": "3f2a".repeat(16), "pod": null, "shut_out": true,
                "more_files": 2,
                "files": [
                    {"path": "/m/a", "opens": 2, "passthrough": 1, "mapped": true, "since": 1},
                    {"path": "/m/b", "opens": 0, "passthrough": 0, "mapped": false, "since": null},
                ],
            }],
            "shut_out": [{"session": "uid=1000", "seconds_left": 9}],
            "blocked": [{"session": "uid=1001", "seconds_left": 90, "why": "denied 5 times within 300 s"}],
        });
        let text = show(&told);
        for part in [
            "python3",
            "container 3f2a3f2a3f2a",
            "open passthrough mapped",
            "inherited",
            "and 2 more",
            "uid=1000 for 9 s",
            "blocked: uid=1001 for 90 s more, denied 5 times",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(show(&json!({"sessions": [], "shut_out": []})).contains("nobody"));
    }
}
