//! The requests of the Docker volume plugin protocol, version 1, and their answers.
//!
//! In: the path and the body of a request (hostile, short). Out: a status and JSON.
//! Promises: a refusal is 500 with one sentence in `Err`, which the engine's command line prints (Podman believes the
//! status, Docker the field); a mount whose answer nobody took is let go again.
//! Held by: the tests below, tests/docker.sh.

use serde::Deserialize;
use serde_json::{Value, json};

use super::volumes::{VolumeLook, Volumes};
use super::{Asker, Options};
use crate::error::{Code, Error, Result};
use crate::telemetry::scrub;

/// What the engine may send; fields that it adds later are passed over.
#[derive(Debug, Default, Deserialize)]
struct Request {
    #[serde(default, rename = "Name")]
    name: Option<String>,
    #[serde(default, rename = "Opts")]
    options: Option<Options>,
    #[serde(default, rename = "ID")]
    id: Option<String>,
}

/// Longer than any engine's.
const ID_BYTES_MAX: usize = 256;

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub json: Value,
    /// Volume and holder of a mount that this answer is about.
    mounted: Option<(String, String)>,
}

impl Answer {
    fn ok(json: Value) -> Answer {
        Answer { status: 200, json, mounted: None }
    }

    /// Whether somebody has to let go of what it says.
    pub fn gives(&self) -> bool {
        self.mounted.is_some()
    }

    fn refused(status: u16, error: &Error) -> Answer {
        let text = format!("{} [{}]", scrub(&error.chain()), error.code());
        Answer { status, json: json!({ "Err": text }), mounted: None }
    }
}

/// What answers a container engine.
pub struct Plugin {
    volumes: Volumes,
}

impl Plugin {
    pub fn new(volumes: Volumes) -> Plugin {
        Plugin { volumes }
    }

    pub fn volumes(&self) -> &Volumes {
        &self.volumes
    }

    /// Blocking, for as long as a mount takes.
    pub fn answer(&self, path: &str, body: &[u8], asker: Option<Asker>) -> Answer {
        let asked = match path.strip_prefix("/VolumeDriver.") {
            Some(asked) => asked,
            None if path == "/Plugin.Activate" => return Answer::ok(json!({ "Implements": ["VolumeDriver"] })),
            None => return Answer::refused(404, &Error::new(Code::Usage, "this plugin has volumes and nothing else")),
        };
        match self.volume(asked, body, asker) {
            Ok(Some(answer)) => answer,
            Ok(None) => Answer::refused(404, &Error::new(Code::Usage, "this plugin does not know that request")),
            Err(refused) => {
                tracing::warn!(asked, "refused: {} [{}]", refused.chain(), refused.code());
                Answer::refused(500, &refused)
            }
        }
    }

    /// Nobody took the answer: whoever asked has given up, and will never let go of what it says.
    pub fn take_back(&self, answer: &Answer) {
        if let Some((volume, holder)) = &answer.mounted
            && let Err(failed) = self.volumes.unmount(volume, holder)
        {
            tracing::warn!(volume, "{}", failed.chain());
        }
    }

    fn volume(&self, asked: &str, body: &[u8], asker: Option<Asker>) -> Result<Option<Answer>> {
        let request: Request = match body {
            // Some requests of some engines have no body.
            [] => Request::default(),
            body => serde_json::from_slice(body)
                .map_err(|_| Error::new(Code::Usage, "the request is not one of the volume plugin protocol"))?,
        };
        let name = || request.name.as_deref().ok_or_else(|| Error::new(Code::Usage, "the request names no volume"));
        let id = || match request.id.as_deref() {
            Some(id) if id.len() <= ID_BYTES_MAX => Ok(id),
            Some(_) => Err(Error::new(Code::Usage, "the ID of a container's use is too long")),
            // Before version 1.1 of the protocol there was none: one holder for all.
            None => Ok(""),
        };
        Ok(Some(match asked {
            "Capabilities" => Answer::ok(json!({ "Capabilities": { "Scope": "local" } })),
            "Create" => {
                self.volumes.create(name()?, request.options.clone().unwrap_or_default())?;
                Answer::ok(json!({ "Err": "" }))
            }
            "Remove" => {
                self.volumes.remove(name()?)?;
                Answer::ok(json!({ "Err": "" }))
            }
            "Mount" => {
                let (name, id) = (name()?, id()?);
                let mountpoint = self.volumes.mount(name, id, asker)?;
                let mounted = Some((name.to_owned(), id.to_owned()));
                Answer { status: 200, json: json!({ "Mountpoint": mountpoint, "Err": "" }), mounted }
            }
            "Unmount" => {
                self.volumes.unmount(name()?, id()?)?;
                Answer::ok(json!({ "Err": "" }))
            }
            "Path" => {
                let look = self.volumes.look(name()?)?;
                Answer::ok(json!({ "Mountpoint": mountpoint(&look), "Err": "" }))
            }
            "Get" => Answer::ok(json!({ "Volume": shown(&self.volumes.look(name()?)?), "Err": "" })),
            "List" => {
                let volumes: Vec<Value> = self.volumes.list().iter().map(shown).collect();
                Answer::ok(json!({ "Volumes": volumes, "Err": "" }))
            }
            _ => return Ok(None),
        }))
    }
}

fn mountpoint(look: &VolumeLook) -> Value {
    look.mountpoint.as_ref().map_or_else(|| json!(""), |path| json!(path))
}

fn shown(look: &VolumeLook) -> Value {
    json!({
        "Name": look.name,
        "Mountpoint": mountpoint(look),
        "Status": {
            "store": look.store,
            "mounted": look.mountpoint.is_some(),
            "containers": look.holders,
            "models": look.models,
        },
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::volumes::fake::volumes;
    use super::*;

    fn plugin(dir: &Path) -> Plugin {
        Plugin::new(volumes(dir).0)
    }

    fn ask(plugin: &Plugin, what: &str, body: Value) -> Value {
        let answer = plugin.answer(&format!("/VolumeDriver.{what}"), body.to_string().as_bytes(), None);
        assert_eq!(answer.status, 200, "{what}: {}", answer.json);
        answer.json
    }

    /// As Docker asks, in its order and its words.
    #[test]
    fn the_life_of_a_volume_as_an_engine_sees_it() {
        let dir = tempfile::tempdir().unwrap();
        let plugin = plugin(dir.path());
        assert_eq!(plugin.answer("/Plugin.Activate", b"", None).json["Implements"], json!(["VolumeDriver"]));
        assert_eq!(ask(&plugin, "Capabilities", json!({}))["Capabilities"]["Scope"], "local");
        let unknown = plugin.answer("/VolumeDriver.Get", br#"{"Name":"v"}"#, None);
        assert_eq!(unknown.status, 500);
        assert_eq!(unknown.json["Err"], "no volume is called \"v\" [NOT_FOUND]");

        let opts = json!({"store": "s3://models/prod", "model": "acme/m"});
        assert_eq!(ask(&plugin, "Create", json!({"Name": "v", "Opts": opts, "Added": 1}))["Err"], "");
        let got = ask(&plugin, "Get", json!({"Name": "v"}));
        assert_eq!((&got["Volume"]["Name"], &got["Volume"]["Mountpoint"]), (&json!("v"), &json!("")));
        assert_eq!(ask(&plugin, "Path", json!({"Name": "v"}))["Mountpoint"], "");
        let path = dir.path().join("volumes/v");
        assert_eq!(ask(&plugin, "Mount", json!({"Name": "v", "ID": "c1"}))["Mountpoint"], json!(path));
        assert_eq!(ask(&plugin, "Path", json!({"Name": "v"}))["Mountpoint"], json!(path));
        let status = &ask(&plugin, "List", json!({}))["Volumes"][0]["Status"];
        assert_eq!(status["containers"], 1);
        assert_eq!(status["models"], json!(["acme/m"]));
        let held = plugin.answer("/VolumeDriver.Remove", br#"{"Name":"v"}"#, None);
        assert!(held.status == 500 && held.json["Err"].as_str().unwrap().contains("[HELD]"), "{held:?}");
        ask(&plugin, "Unmount", json!({"Name": "v", "ID": "c1"}));
        ask(&plugin, "Remove", json!({"Name": "v"}));
        // An engine lists without a body.
        assert_eq!(plugin.answer("/VolumeDriver.List", b"", None).json["Volumes"], json!([]));
    }

    #[test]
    fn what_is_no_request_is_refused_and_nothing_of_it_is_done() {
        let dir = tempfile::tempdir().unwrap();
        let plugin = plugin(dir.path());
        for (path, body, status) in [
            ("/", "{}", 404),
            ("/VolumeDriver.Destroy", "{}", 404),
            ("/VolumeDriver.Create", "{", 500),
            ("/VolumeDriver.Create", "[]", 500),
            ("/VolumeDriver.Create", "{}", 500),
            ("/VolumeDriver.Create", r#"{"Name":7}"#, 500),
            ("/VolumeDriver.Create", r#"{"Name":"../x"}"#, 500),
            ("/VolumeDriver.Create", r#"{"Name":"x","Opts":{"a":1}}"#, 500),
            ("/VolumeDriver.Mount", r#"{"Name":"x"}"#, 500),
        ] {
            let answer = plugin.answer(path, body.as_bytes(), None);
            assert_eq!(answer.status, status, "{path} {body}");
            assert!(!answer.json["Err"].as_str().unwrap().is_empty());
        }
        assert!(plugin.volumes().list().is_empty());
    }

    #[test]
    fn a_mount_whose_answer_nobody_took_is_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let plugin = plugin(dir.path());
        ask(&plugin, "Create", json!({"Name": "v", "Opts": {"store": "s3://models/prod"}}));
        let answer = plugin.answer("/VolumeDriver.Mount", br#"{"Name":"v","ID":"c1"}"#, None);
        assert_eq!(plugin.volumes().look("v").unwrap().holders, 1);
        plugin.take_back(&answer);
        assert_eq!(plugin.volumes().look("v").unwrap().holders, 0);
        assert_eq!(plugin.volumes().look("v").unwrap().mountpoint, None);
    }
}
