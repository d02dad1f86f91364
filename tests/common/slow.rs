//! A line to a server that is far, narrow, and sometimes dead: a proxy that passes bytes on late and paced, and lets
//! chosen connections fall silent without closing them.

// Tests and benches/slow_line.rs each use a part of it.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// What is wrong with a connection.
#[derive(Debug, Clone, Copy)]
pub enum Sick {
    /// After this many bytes of the server's nothing more comes, and nobody hangs up.
    SilentAfter(usize),
    /// Bytes a second.
    Trickle(u64),
}

/// The line, and which connections are sick: told by their number, from 0.
#[derive(Clone, Copy)]
pub struct Line {
    /// From the server's byte to the client's.
    pub latency: Duration,
    /// Of one connection.
    pub bytes_per_s: u64,
    /// One that says nothing more does not hang up either.
    pub sick: fn(usize) -> Option<Sick>,
}

/// One connection in ten is stuck, each time in another way.
pub fn one_in_ten(connection: usize) -> Option<Sick> {
    const WAYS: [Sick; 4] =
        [Sick::SilentAfter(0), Sick::SilentAfter(100), Sick::SilentAfter(50_000), Sick::Trickle(10_000)];
    (connection % 10 == 3).then(|| WAYS[connection / 10 % WAYS.len()])
}

pub struct SlowLine {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

impl SlowLine {
    /// Passes every connection on to `server` until dropped; those open then end with their peers.
    pub fn to(server: SocketAddr, line: Line) -> SlowLine {
        Self::listen(TcpListener::bind(("127.0.0.1", 0)).expect("a free port"), server, line)
    }

    pub fn listen(listener: TcpListener, server: SocketAddr, line: Line) -> SlowLine {
        let address = listener.local_addr().expect("a bound listener has an address");
        let (connections, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let slow = SlowLine { address, connections, stop };
        let (connections, stop) = (slow.connections.clone(), slow.stop.clone());
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let number = connections.fetch_add(1, Ordering::Relaxed);
                // A server that is gone is seen by the client as a connection that ends.
                let _ = pass_on(client, server, line, (line.sick)(number));
            }
        });
        slow
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for SlowLine {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the listener so that it sees the flag.
        let _ = TcpStream::connect(self.address);
    }
}

/// Blocks on their way in one connection: at 128 KiB and the latencies of tests more than any line holds.
const BLOCKS_MAX: usize = 256;
const BLOCK_BYTES: usize = 128 << 10;

fn pass_on(client: TcpStream, server: SocketAddr, line: Line, sick: Option<Sick>) -> std::io::Result<()> {
    let server = TcpStream::connect(server)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (mut asks, mut asked) = (client.try_clone()?, server.try_clone()?);
    let gone = Arc::new(AtomicBool::new(false));
    let client_gone = gone.clone();
    thread::spawn(move || {
        // However it ends, the other side is to know.
        let _ = std::io::copy(&mut asks, &mut asked);
        client_gone.store(true, Ordering::Relaxed);
        let _ = asked.shutdown(std::net::Shutdown::Write);
    });
    let (send, receive) = mpsc::sync_channel::<(Instant, Vec<u8>)>(BLOCKS_MAX);
    thread::spawn(move || {
        let mut server = server;
        loop {
            let mut block = vec![0; BLOCK_BYTES];
            match server.read(&mut block) {
                Ok(0) | Err(_) => return,
                Ok(got) => block.truncate(got),
            }
            if send.send((Instant::now() + line.latency, block)).is_err() {
                return;
            }
        }
    });
    thread::spawn(move || deliver(client, &receive, line, sick, &gone));
    Ok(())
}

/// Sends each block when it is due and no faster than the line.
fn deliver(
    mut client: TcpStream,
    blocks: &mpsc::Receiver<(Instant, Vec<u8>)>,
    line: Line,
    sick: Option<Sick>,
    gone: &AtomicBool,
) {
    let (rate, mut until_silence) = match sick {
        None => (line.bytes_per_s, usize::MAX),
        Some(Sick::SilentAfter(bytes)) => (line.bytes_per_s, bytes),
        Some(Sick::Trickle(rate)) => (rate, usize::MAX),
    };
    let mut free_at = Instant::now();
    for (due, block) in blocks {
        // A tenth of a second's worth at a time, so that a trickle is one.
        for piece in block.chunks((rate / 10).clamp(1, BLOCK_BYTES as u64) as usize) {
            thread::sleep(due.max(free_at).saturating_duration_since(Instant::now()));
            let piece = &piece[..piece.len().min(until_silence)];
            until_silence -= piece.len();
            if client.write_all(piece).is_err() {
                return;
            }
            free_at = due.max(free_at) + Duration::from_secs_f64(piece.len() as f64 / rate as f64);
            if until_silence == 0 {
                // Nobody hangs up before the client does.
                while !gone.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(20));
                }
                return;
            }
        }
    }
    let _ = client.shutdown(std::net::Shutdown::Write);
}
