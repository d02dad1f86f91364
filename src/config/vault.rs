//! Which Vault is meant and who we are to it, from the layers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::layers::Layers;
use crate::error::{Code, Error, Result};
use crate::refuse;
use crate::units;
use crate::vault::{AuthMethod, SERVICE_ACCOUNT_TOKEN, VaultSettings};

/// For one call, attempts included.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(15);
/// How often the token is looked at while nothing else is asked.
const CHECK_DEFAULT: Duration = Duration::from_secs(60);
/// The same where a lost token locks the mount, and between what and what it may be said.
const CHECK_LOCKING: Duration = Duration::from_millis(500);
const CHECK_RANGE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(60));

/// `None`: no Vault was named.
///
/// # Errors
/// `USAGE` for an address that is no https (or loopback http) URL, for an unknown method, for what a method needs and was
/// not given.
pub fn vault_settings(layers: &Layers) -> Result<Option<VaultSettings>> {
    let plain = layers.switch("vault-plain-http")?;
    let Some(address) = layers.parse("vault-addr", |text| check_address(text, plain))? else { return Ok(None) };
    let text = |name| layers.parse(name, |text| Ok(text.to_owned()));
    let path = |name| layers.parse(name, |text| super::absolute(Path::new(text)));
    let method = text("vault-auth")?.unwrap_or_else(|| "token".into());
    let mount = |usual: &str| -> Result<String> {
        let mount = text("vault-auth-mount")?.unwrap_or_else(|| usual.into());
        let mount = mount.trim_matches('/').to_owned();
        match mount.is_empty() || mount.contains("..") {
            true => Err(Error::new(Code::Usage, "vault-auth-mount is no path in Vault")),
            false => Ok(mount),
        }
    };
    let need = |name: &'static str| -> Result<String> {
        text(name)?.ok_or_else(|| Error::new(Code::Usage, format!("vault-auth {method} needs {name}")))
    };
    let auth = match method.as_str() {
        "token" => AuthMethod::Token { file: path("vault-token-file")? },
        "approle" => AuthMethod::AppRole {
            mount: mount("approle")?,
            role_id: need("vault-role-id")?,
            secret_id_file: path("vault-secret-id-file")?,
            wrapped: layers.switch("vault-secret-id-wrapped")?,
        },
        "kubernetes" => AuthMethod::Kubernetes {
            mount: mount("kubernetes")?,
            role: need("vault-role")?,
            jwt_file: path("vault-jwt-file")?.unwrap_or_else(|| PathBuf::from(SERVICE_ACCOUNT_TOKEN)),
        },
        "jwt" => AuthMethod::Jwt {
            mount: mount("jwt")?,
            role: text("vault-role")?,
            jwt_file: need("vault-jwt-file").map(PathBuf::from)?,
        },
        "cert" => {
            need("vault-client-cert")?;
            AuthMethod::Cert { mount: mount("cert")?, role: text("vault-role")? }
        }
        "aws" => AuthMethod::Aws {
            mount: mount("aws")?,
            role: text("vault-role")?,
            sts: text("vault-aws-sts")?.unwrap_or_else(|| "https://sts.amazonaws.com/".into()),
            region: text("vault-aws-region")?.unwrap_or_else(|| "us-east-1".into()),
            server_id: layers.parse("vault-aws-server-id", check_server_id)?,
        },
        "userpass" => AuthMethod::Userpass {
            mount: mount("userpass")?,
            username: need("vault-username")?,
            password_file: path("vault-password-file")?,
        },
        other => return Err(no_method(other)),
    };
    let timeout = layers.parse("vault-timeout", units::parse_duration)?.unwrap_or(TIMEOUT_DEFAULT);
    if timeout.is_zero() {
        refuse!(Usage, "vault-timeout is zero; give a second or more");
    }
    let lock_on_loss = layers.parse("on-key-loss", super::parse_on_key_loss)? == Some(super::OnKeyLoss::Lock);
    let check = match layers.parse("key-loss-check", parse_check)? {
        said if lock_on_loss => said.unwrap_or(CHECK_LOCKING),
        _ => CHECK_DEFAULT,
    };
    Ok(Some(VaultSettings {
        address,
        namespace: layers.parse("vault-namespace", check_namespace)?,
        ca_cert: path("vault-ca-cert")?,
        client_cert: path("vault-client-cert")?,
        client_key: path("vault-client-key")?,
        auth,
        timeout,
        check,
        lock_on_loss,
    }))
}

pub(super) fn parse_check(text: &str) -> Result<Duration> {
    let (check, (least, most)) = (units::parse_duration(text)?, CHECK_RANGE);
    if check < least || check > most {
        refuse!(Usage, "key-loss-check {check:?} is not from {least:?} to {most:?}");
    }
    Ok(check)
}

const METHODS: [&str; 7] = ["token", "approle", "kubernetes", "jwt", "cert", "aws", "userpass"];

fn no_method(text: &str) -> Error {
    Error::new(Code::Usage, format!("vault-auth `{text}` is none of {}", METHODS.join(", ")))
}

pub(super) fn check_method(text: &str) -> Result<()> {
    if METHODS.contains(&text) { Ok(()) } else { Err(no_method(text)) }
}

/// Tokens and keys cross this connection: without TLS only to this very machine, unless that was asked for by name.
fn check_address(text: &str, plain: bool) -> Result<String> {
    let url = url::Url::parse(text).map_err(|err| {
        Error::new(Code::Usage, "the address of Vault is no URL; write https://HOST:8200").with_source(err)
    })?;
    let loopback = match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    };
    match url.scheme() {
        "https" => {}
        "http" if loopback || plain => {}
        "http" => refuse!(
            Usage,
            "Vault at {text} would be spoken to without TLS, in clear; use https, or say vault-plain-http"
        ),
        other => refuse!(Usage, "Vault is reached by https, not by {other}"),
    }
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        refuse!(Usage, "the address of Vault holds more than a place; write https://HOST:8200");
    }
    Ok(text.trim_end_matches('/').to_owned())
}

pub(super) fn check_namespace(text: &str) -> Result<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
    if text.is_empty() || text.len() > 256 || !text.chars().all(plain) {
        refuse!(Usage, "{text:?} is no namespace of Vault");
    }
    Ok(text.to_owned())
}

/// It is sent in a header, and compared byte by byte.
pub(super) fn check_server_id(text: &str) -> Result<String> {
    if text.is_empty() || text.len() > 256 || !text.bytes().all(|b| b.is_ascii_graphic()) {
        refuse!(Usage, "vault-aws-server-id is no plain word; it is what Vault's iam_server_id_header_value says");
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_asked_about_within_bounds() {
        for bad in ["10ms", "2m", "0s", "often"] {
            assert_eq!(parse_check(bad).expect_err(bad).code(), Code::Usage);
        }
        assert_eq!(parse_check("5s").expect("within"), Duration::from_secs(5));
    }

    fn settings(words: &str) -> Result<Option<VaultSettings>> {
        let mut layers = Layers::default();
        layers.mount_options(&super::super::layers::split_list(words), false)?;
        vault_settings(&layers)
    }

    #[test]
    fn without_an_address_there_is_no_vault() {
        assert_eq!(settings("vault-auth=approle").unwrap(), None);
    }

    #[test]
    fn every_method_has_what_it_needs_or_says_what_is_missing() {
        let at = "vault-addr=https://vault:8200/,vault-auth=";
        for (words, name) in [
            ("token", "token"),
            ("approle,vault-role-id=r,vault-secret-id-file=/s", "approle"),
            ("kubernetes,vault-role=r", "kubernetes"),
            ("jwt,vault-jwt-file=/j", "jwt"),
            ("cert,vault-client-cert=/c,vault-client-key=/k", "cert"),
            ("aws,vault-role=r", "aws"),
            ("userpass,vault-username=u", "userpass"),
        ] {
            let got = settings(&format!("{at}{words}")).unwrap().unwrap();
            assert_eq!((got.auth.name(), got.address.as_str()), (name, "https://vault:8200"));
        }
        for (words, missing) in [
            ("approle", "vault-role-id"),
            ("kubernetes", "vault-role"),
            ("jwt", "vault-jwt-file"),
            ("cert", "vault-client-cert"),
            ("userpass", "vault-username"),
            ("ldap", "none of token"),
        ] {
            let err = settings(&format!("{at}{words}")).unwrap_err();
            assert!(err.code() == Code::Usage && err.chain().contains(missing), "{words}: {err:?}");
        }
    }

    #[test]
    fn a_token_crosses_no_network_in_clear_unless_that_is_said() {
        for ok in ["http://127.0.0.1:8200", "http://localhost:8200", "http://[::1]:8200", "https://vault"] {
            assert!(settings(&format!("vault-addr={ok}")).unwrap().is_some(), "{ok}");
        }
        for bad in ["http://vault:8200", "ftp://vault", "vault:8200", "https://a:b@vault", "https://vault?x=1"] {
            assert_eq!(settings(&format!("vault-addr={bad}")).unwrap_err().code(), Code::Usage, "{bad}");
        }
        assert!(settings("vault-addr=http://vault:8200,vault-plain-http").unwrap().is_some());
    }
}
