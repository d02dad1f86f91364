//! A report as SARIF 2.1.0, which code hosts and pipelines show.

use serde_json::{Value, json};

use super::{Confidence, Finding, Format, Report};

/// One document, one run. What could not be read is a notification, and the run then did not succeed.
pub fn sarif(report: &Report) -> Value {
    let rules: Vec<Value> = Format::ALL
        .iter()
        .map(|format| {
            json!({
                "id": format.name(),
                "shortDescription": {"text": format!("Model weights in plaintext: {}", format.title())},
                "fullDescription": {"text": "Weights that lie in an image or a tree in plaintext can be copied by whoever has it."},
                "help": {"text": "Seal the model and mount it when the container runs: modelfs seal, modelfs run."},
                "properties": {"tags": ["security", "model-weights"]},
            })
        })
        .collect();
    let results: Vec<Value> = report
        .findings
        .iter()
        .map(|finding| result(finding, false))
        .chain(report.accepted.iter().map(|finding| result(finding, true)))
        .collect();
    let mut told: Vec<Value> = report
        .unread
        .iter()
        .map(|unread| {
            json!({
                "level": "error",
                "message": {"text": format!("{}: {}", place(&unread.target, &unread.path), unread.why)},
                "descriptor": {"id": "unread"},
            })
        })
        .collect();
    if !report.complete {
        told.push(json!({"level": "error", "message": {"text": "the time was over before the end"}}));
    }
    let untold = report.findings_untold + report.unread_untold;
    if untold > 0 {
        told.push(json!({"level": "error", "message": {"text": format!("{untold} more are not listed")}}));
    }
    json!({
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": {"driver": {
                "name": "modelfs scan",
                "semanticVersion": env!("CARGO_PKG_VERSION"),
                "version": env!("CARGO_PKG_VERSION"),
                "rules": rules,
                "notifications": [{"id": "unread", "shortDescription": {"text": "A place that could not be looked at"}}],
            }},
            "invocations": [{"executionSuccessful": told.is_empty(), "toolExecutionNotifications": told}],
            "columnKind": "utf16CodeUnits",
            "results": results,
        }],
    })
}

fn place(target: &str, path: &str) -> String {
    if path.is_empty() { target.to_owned() } else { format!("{target}: {path}") }
}

fn result(finding: &Finding, accepted: bool) -> Value {
    let rule = Format::ALL.iter().position(|format| *format == finding.format).expect("every format is in the list");
    let mut text = format!("{}: {} ({})", finding.format.title(), finding.path, finding.why);
    let mut logical = Vec::new();
    if let Some(layer) = &finding.layer {
        for image in &layer.images {
            text.push_str(&format!("; layer {} of {} of {}", image.position, image.of, image.image));
            if let Some(line) = &image.created_by {
                text.push_str(&format!(", made by `{line}`"));
            }
            if let Some((by, _)) = image.hidden_by {
                text.push_str(&format!(", hidden by layer {by}"));
            }
            logical.push(json!({
                "fullyQualifiedName": format!("{}/{}/{}", image.image, image.position, finding.path),
                "kind": "resource",
            }));
        }
    }
    text.push_str(&format!(". {}.", finding.fix));
    let mut location = json!({
        "physicalLocation": {"artifactLocation": {"uri": uri(finding)}},
    });
    if !logical.is_empty() {
        location["logicalLocations"] = Value::Array(logical);
    }
    let mut value = json!({
        "ruleId": finding.format.name(),
        "ruleIndex": rule,
        "level": match finding.confidence {
            Confidence::Certain => "error",
            Confidence::Likely => "warning",
            Confidence::Info => "note",
        },
        "message": {"text": text},
        "locations": [location],
        "partialFingerprints": {"modelfsPlace/v1": fingerprint(finding)},
        "properties": {
            "confidence": finding.confidence.name(),
            "target": finding.target,
            "bytes": finding.bytes,
            "layer": finding.layer,
        },
    });
    if let Some(sha256) = &finding.sha256 {
        value["fingerprints"] = json!({"sha-256/v1": sha256});
    }
    if accepted {
        value["suppressions"] = json!([{"kind": "external", "justification": "accepted by its digest"}]);
    }
    value
}

/// The same for the same place, however sure the next version of this program is.
fn fingerprint(finding: &Finding) -> String {
    let layer = finding.layer.as_ref().map_or("", |layer| layer.digest.as_deref().unwrap_or(&layer.file));
    hex::encode(crate::crypto::sha256(&[layer.as_bytes(), b"\0", finding.path.as_bytes()]))
}

/// The path as a relative URI: everything that is not plain is percent-encoded.
fn uri(finding: &Finding) -> String {
    let mut out = String::new();
    for byte in finding.path.trim_start_matches('/').bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' | b'!' => out.push(byte as char),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    if out.is_empty() { "-".to_owned() } else { out }
}
