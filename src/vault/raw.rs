//! Requests of which vaultrs has no type, or one whose fields would be held longer than needed.

use rustify::endpoint::Endpoint;
use rustify::enums::{RequestMethod, RequestType, ResponseType};
use rustify::errors::ClientError;
use serde_json::{Map, Value};
use zeroize::Zeroize;

#[derive(Debug, Clone, Copy)]
pub enum Method {
    Get,
    Post,
}

/// Any request of Vault's API. The body is wiped when dropped.
pub struct Raw {
    method: Method,
    path: String,
    body: Option<Map<String, Value>>,
}

impl Raw {
    pub fn new(method: Method, path: String, body: Option<Map<String, Value>>) -> Raw {
        Raw { method, path, body }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(body) = &mut self.body {
            wipe_map(body);
        }
    }
}

impl Endpoint for Raw {
    type Response = Value;
    const REQUEST_BODY_TYPE: RequestType = RequestType::JSON;
    const RESPONSE_BODY_TYPE: ResponseType = ResponseType::JSON;

    fn path(&self) -> String {
        self.path.clone()
    }

    fn method(&self) -> RequestMethod {
        match self.method {
            Method::Get => RequestMethod::GET,
            Method::Post => RequestMethod::POST,
        }
    }

    fn body(&self) -> Result<Option<Vec<u8>>, ClientError> {
        Ok(self.body.as_ref().map(|body| serde_json::to_vec(body).expect("a JSON map has a JSON form")))
    }
}

/// Overwrites every string of a map and empties it.
pub fn wipe_map(map: &mut Map<String, Value>) {
    for (_, value) in map.iter_mut() {
        wipe_value(value);
    }
    map.clear();
}

fn wipe_value(value: &mut Value) {
    match value {
        Value::String(text) => text.zeroize(),
        Value::Array(values) => values.iter_mut().for_each(wipe_value),
        Value::Object(map) => wipe_map(map),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}
