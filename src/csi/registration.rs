//! Tells the kubelet that the driver is there: its plugin registration service, over HTTP/2 as far as that needs.
//!
//! In: connections on a socket in the kubelet's `plugins_registry`. Out: [`PluginInfo`], and what the kubelet made of it.
//! Why not the server of `service`: the kubelet dials this socket with its path, percent-encoded, as `:authority`. That is no
//! authority by RFC 3986, and the libraries below tonic end such a stream before anyone sees it. So the headers of requests are
//! not decoded here at all. The two calls are told apart by their messages: the question is empty, the verdict never is.
//! Promises: a frame longer than HTTP/2's first limit, or one stream too many, ends the connection; nothing else is kept.
//! Held by: the tests below, the kubelet in tests/kubernetes.sh.

use std::collections::HashMap;
use std::io;

use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::proto::{PluginInfo, RegistrationStatus};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// SETTINGS_MAX_FRAME_SIZE before anyone sets it.
const FRAME_BYTES_MAX: usize = 16 << 10;
/// The kubelet makes one call at a time.
const STREAMS_MAX: usize = 8;
/// A message of gRPC: one byte of flags, four of length.
const GRPC_HEAD_BYTES: usize = 5;

/// Frame types and flags of RFC 9113.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;

/// HPACK: `:status: 200` is entry 8 of the static table, `content-type` entry 31; both without the dynamic table.
const RESPONSE_HEADERS: &[u8] = b"\x88\x0f\x10\x10application/grpc";
const RESPONSE_TRAILERS: &[u8] = b"\x00\x0bgrpc-status\x010";

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

/// Serves one connection to its end. `verdict` hears what the kubelet made of the registration.
pub async fn serve<S>(mut stream: S, info: &PluginInfo, verdict: impl Fn(RegistrationStatus)) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut preface = [0; PREFACE.len()];
    stream.read_exact(&mut preface).await?;
    if preface != PREFACE {
        return Err(bad("this is not HTTP/2"));
    }
    write(&mut stream, SETTINGS, 0, 0, &[]).await?;
    let mut messages: HashMap<u32, Vec<u8>> = HashMap::new();
    loop {
        let Some(frame) = read(&mut stream).await? else { return Ok(()) };
        match frame.kind {
            SETTINGS if frame.flags & ACK == 0 => write(&mut stream, SETTINGS, ACK, 0, &[]).await?,
            PING if frame.flags & ACK == 0 => write(&mut stream, PING, ACK, 0, &frame.payload).await?,
            GOAWAY => return Ok(()),
            RST_STREAM => drop(messages.remove(&frame.stream)),
            HEADERS => {
                if messages.len() == STREAMS_MAX {
                    return Err(bad("too many calls at once"));
                }
                messages.insert(frame.stream, Vec::new());
            }
            DATA => {
                let Some(message) = messages.get_mut(&frame.stream) else { continue };
                let padding = if frame.flags & PADDED == 0 { None } else { frame.payload.first().copied() };
                let end = frame.payload.len().checked_sub(usize::from(padding.unwrap_or(0)));
                let Some(content) = end.and_then(|end| frame.payload.get(usize::from(padding.is_some())..end)) else {
                    return Err(bad("padding longer than its frame"));
                };
                message.extend_from_slice(content);
                if message.len() > FRAME_BYTES_MAX {
                    return Err(bad("a message too long for a registration"));
                }
                if frame.flags & END_STREAM != 0
                    && let Some(message) = messages.remove(&frame.stream)
                {
                    let answer = answer(&message, info, &verdict)?;
                    write(&mut stream, HEADERS, END_HEADERS, frame.stream, RESPONSE_HEADERS).await?;
                    write(&mut stream, DATA, 0, frame.stream, &answer).await?;
                    write(&mut stream, HEADERS, END_HEADERS | END_STREAM, frame.stream, RESPONSE_TRAILERS).await?;
                }
            }
            // WINDOW_UPDATE, PRIORITY, CONTINUATION and what is yet to be invented: nothing here depends on them.
            _ => {}
        }
    }
}

/// The answer to one message, each with its gRPC head.
fn answer(message: &[u8], info: &PluginInfo, verdict: &impl Fn(RegistrationStatus)) -> io::Result<Vec<u8>> {
    let Some((head, body)) = message.split_at_checked(GRPC_HEAD_BYTES) else {
        return Err(bad("a call without a message"));
    };
    let said = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
    if head[0] != 0 || said as usize != body.len() {
        return Err(bad("a message that is compressed or of another length than it says"));
    }
    let told = if body.is_empty() {
        info.encode_to_vec()
    } else {
        verdict(RegistrationStatus::decode(body).map_err(|_| bad("a message of another service"))?);
        Vec::new()
    };
    let mut framed = vec![0];
    framed.extend((told.len() as u32).to_be_bytes());
    framed.extend(told);
    Ok(framed)
}

fn bad(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// `None`: the peer closed the connection between two frames.
async fn read<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Option<Frame>> {
    let mut head = [0; 9];
    match stream.read_exact(&mut head).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
    if len > FRAME_BYTES_MAX {
        return Err(bad("a frame longer than allowed"));
    }
    let mut payload = vec![0; len];
    stream.read_exact(&mut payload).await?;
    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & (u32::MAX >> 1);
    Ok(Some(Frame { kind: head[3], flags: head[4], stream, payload }))
}

async fn write<S: AsyncWrite + Unpin>(stream: &mut S, kind: u8, flags: u8, id: u32, payload: &[u8]) -> io::Result<()> {
    let len = u32::try_from(payload.len()).map_err(|_| bad("an answer too long"))?.to_be_bytes();
    let mut frame = vec![len[1], len[2], len[3], kind, flags];
    frame.extend(id.to_be_bytes());
    frame.extend(payload);
    stream.write_all(&frame).await
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn info() -> PluginInfo {
        PluginInfo {
            kind: "CSIPlugin".into(),
            name: "csi.modelfs".into(),
            endpoint: "/var/lib/kubelet/plugins/csi.modelfs/csi.sock".into(),
            supported_versions: vec!["1.0.0".into()],
        }
    }

    /// What a client sends: the preface, settings, one call.
    async fn call(message: &[u8], headers: &[u8]) -> (Vec<u8>, Vec<RegistrationStatus>) {
        let (mut client, server) = tokio::io::duplex(1 << 16);
        client.write_all(PREFACE).await.expect("room");
        write(&mut client, SETTINGS, 0, 0, &[]).await.expect("room");
        write(&mut client, HEADERS, END_HEADERS, 1, headers).await.expect("room");
        let mut framed = vec![0];
        framed.extend((message.len() as u32).to_be_bytes());
        framed.extend(message);
        write(&mut client, DATA, END_STREAM, 1, &framed).await.expect("room");
        write(&mut client, GOAWAY, 0, 0, &[0; 8]).await.expect("room");
        let heard = Mutex::new(Vec::new());
        serve(server, &info(), |status| heard.lock().expect("alone").push(status)).await.expect("served");
        let mut data = Vec::new();
        while let Some(frame) = read(&mut client).await.expect("frames") {
            if frame.kind == DATA {
                data.extend(frame.payload);
            }
        }
        (data, heard.into_inner().expect("alone"))
    }

    #[tokio::test]
    async fn the_question_is_answered_whatever_its_headers_say() {
        let (data, heard) = call(&[], b"\x41\x9f%2Fvar%2Flib that no HPACK decoder takes").await;
        assert_eq!(PluginInfo::decode(&data[GRPC_HEAD_BYTES..]).expect("a message"), info());
        assert!(heard.is_empty());
    }

    #[tokio::test]
    async fn the_verdict_is_heard() {
        for status in [
            RegistrationStatus { plugin_registered: true, error: String::new() },
            RegistrationStatus { plugin_registered: false, error: "no such version".into() },
        ] {
            let (data, heard) = call(&status.encode_to_vec(), b"").await;
            assert_eq!((data.as_slice(), heard), ([0u8; GRPC_HEAD_BYTES].as_slice(), vec![status]));
        }
    }

    #[tokio::test]
    async fn what_is_no_registration_ends_the_connection() {
        let mut long_frame = PREFACE.to_vec();
        long_frame.extend([0xff, 0xff, 0xff, DATA, 0, 0, 0, 0, 1]);
        for hostile in [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), long_frame] {
            let (mut client, server) = tokio::io::duplex(1 << 16);
            client.write_all(&hostile).await.expect("room");
            let ended = serve(server, &info(), |_| panic!("nothing was registered")).await.expect_err("refused");
            assert_eq!(ended.kind(), io::ErrorKind::InvalidData);
        }
    }
}
