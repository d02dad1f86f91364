//! IAM and STS as Vault's aws secrets engine asks them.
#![allow(dead_code)] // each test binary uses its own part

use std::collections::HashMap;
use std::net::TcpStream;
use std::sync::{Arc, Mutex};

use super::common::hostile::{Hostile, Request, respond};

/// Every key that it makes has this secret, and this session token if it is STS that makes it. Answers which users there are.
pub fn start(secret: &str, session: &str) -> (Hostile, Arc<Mutex<Vec<String>>>) {
    let users: Arc<Mutex<Vec<String>>> = Arc::default();
    let known = users.clone();
    let (secret, session) = (secret.to_owned(), session.to_owned());
    let server = Hostile::start(move |request: &Request, stream: &mut TcpStream| {
        let asked: HashMap<String, String> = url::form_urlencoded::parse(&request.body).into_owned().collect();
        let (action, user) = (asked["Action"].as_str(), asked.get("UserName").cloned().unwrap_or_default());
        let mut users = known.lock().expect("no panic under the lock");
        let result = match action {
            "CreateUser" => {
                users.push(user.clone());
                format!("<User><Path>/</Path><UserName>{user}</UserName><UserId>U</UserId><Arn>a</Arn></User>")
            }
            "CreateAccessKey" => format!(
                "<AccessKey><UserName>{user}</UserName><AccessKeyId>AKIAUSER</AccessKeyId><Status>Active</Status>\
                 <SecretAccessKey>{secret}</SecretAccessKey></AccessKey>"
            ),
            "AssumeRole" => format!(
                "<Credentials><AccessKeyId>ASIAROLE</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey>\
                 <SessionToken>{session}</SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration></Credentials>\
                 <AssumedRoleUser><Arn>arn:aws:sts::123456789012:assumed-role/models/m</Arn><AssumedRoleId>A:m</AssumedRoleId>\
                 </AssumedRoleUser>"
            ),
            "DeleteUser" => {
                users.retain(|known| *known != user);
                String::new()
            }
            "ListAccessKeys" => "<AccessKeyMetadata></AccessKeyMetadata><IsTruncated>false</IsTruncated>".into(),
            "ListGroupsForUser" => "<Groups></Groups><IsTruncated>false</IsTruncated>".into(),
            "ListUserPolicies" => "<PolicyNames></PolicyNames><IsTruncated>false</IsTruncated>".into(),
            "ListAttachedUserPolicies" => {
                "<AttachedPolicies></AttachedPolicies><IsTruncated>false</IsTruncated>".into()
            }
            _ => String::new(),
        };
        let body = format!(
            "<{action}Response xmlns=\"https://iam.amazonaws.com/doc/2010-05-08/\"><{action}Result>{result}</{action}Result>\
             <ResponseMetadata><RequestId>1</RequestId></ResponseMetadata></{action}Response>"
        );
        respond(stream, "200 OK", &[("Content-Type", "text/xml")], body.as_bytes())
    });
    (server, users)
}
