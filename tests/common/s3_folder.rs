//! An S3 bucket that is a folder, for readers: what it is sent proves nothing to it.

use std::fs;
use std::net::TcpStream;
use std::path::Path;

use super::hostile::{Request, head, respond};

/// Names and sizes below a folder.
fn objects(folder: &Path, below: &str) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = format!("{below}{}", entry.file_name().to_str().expect("utf-8"));
        match entry.metadata().expect("of our own file") {
            meta if meta.is_dir() => found.extend(objects(&entry.path(), &format!("{name}/"))),
            meta => found.push((name, meta.len())),
        }
    }
    found
}

/// Lists and reads, of what a request asks of `bucket`.
pub fn serve_folder(folder: &Path, bucket: &str, request: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
    let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
    if query.contains("list-type=2") {
        let asked: Vec<(String, String)> = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        let said = |name: &str| asked.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value.as_str());
        let (prefix, folders_only) = (said("prefix"), !said("delimiter").is_empty());
        let mut listed = std::collections::BTreeSet::new();
        for (name, size) in objects(folder, "") {
            let Some(rest) = name.strip_prefix(prefix) else { continue };
            listed.insert(match rest.split_once('/').filter(|_| folders_only) {
                Some((dir, _)) => format!("<CommonPrefixes><Prefix>{prefix}{dir}/</Prefix></CommonPrefixes>"),
                None => format!(
                    "<Contents><Key>{name}</Key><LastModified>2026-11-18T10:00:00.000Z</LastModified>\
                     <Size>{size}</Size></Contents>"
                ),
            });
        }
        let listed: String = listed.into_iter().collect();
        let xml = format!("<?xml version=\"1.0\"?><ListBucketResult>{listed}</ListBucketResult>");
        return respond(stream, "200 OK", &[("Content-Type", "application/xml")], xml.as_bytes());
    }
    let name = path.trim_start_matches('/').strip_prefix(bucket).unwrap_or_default().trim_start_matches('/');
    let Ok(bytes) = fs::read(folder.join(name)) else { return respond(stream, "404 Not Found", &[], b"") };
    if request.method == "HEAD" {
        return head(stream, "200 OK", &[], Some(bytes.len() as u64));
    }
    match request.range() {
        Some((first, last)) if (last as usize) < bytes.len() => {
            let range = format!("bytes {first}-{last}/{}", bytes.len());
            let part = &bytes[first as usize..=last as usize];
            respond(stream, "206 Partial Content", &[("Content-Range", &range)], part)
        }
        Some(_) => respond(stream, "416 Range Not Satisfiable", &[], b""),
        None => respond(stream, "200 OK", &[], &bytes),
    }
}
