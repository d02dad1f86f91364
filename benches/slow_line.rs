//! The bad line of tests/slow_store.rs as a program of its own, for benches/slow_store.sh.
//!
//! `slow_line LISTEN SERVER LATENCY_MS MB_PER_S_A_CONNECTION none|one-in-ten`: passes bytes on until it is killed.
//! Without arguments it does nothing, so that building all targets also runs it.

#[path = "../tests/common/slow.rs"]
mod slow;

use std::net::TcpListener;
use std::time::Duration;

use slow::{Line, SlowLine, one_in_ten};

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let [listen, server, latency_ms, mb_per_s, sick] = words.as_slice() else {
        assert!(words.is_empty(), "slow_line LISTEN SERVER LATENCY_MS MB_PER_S none|one-in-ten");
        return println!("slow_line: started without arguments, there is nothing to measure");
    };
    let line = Line {
        latency: Duration::from_millis(latency_ms.parse().expect("a number of milliseconds")),
        bytes_per_s: mb_per_s.parse::<u64>().expect("a number of megabytes a second") * 1_000_000,
        sick: match sick.as_str() {
            "none" => |_| None,
            "one-in-ten" => one_in_ten,
            other => panic!("connections are sick `none` or `one-in-ten`, not {other}"),
        },
    };
    let listener = TcpListener::bind(listen).expect("an address of this machine");
    let _line = SlowLine::listen(listener, server.parse().expect("the server's address"), line);
    loop {
        std::thread::park();
    }
}
