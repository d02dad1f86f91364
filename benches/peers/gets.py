"""Parallel range GETs, thrown away: `gets.py URL SIZE PARALLEL PART`; for want of benches/gets.rs.

Threads, each with one connection and one buffer. Prints {"seconds", "cpu"}; fails unless every byte came.
"""

from __future__ import annotations

import http.client
import json
import resource
import sys
import threading
import time
import urllib.parse


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    url, size, parallel, part = urllib.parse.urlsplit(sys.argv[1]), *map(int, sys.argv[2:5])
    starts = iter(range(0, size, part))
    lock, got, failed = threading.Lock(), [0] * parallel, []

    def fetch(which: int) -> None:
        connection = http.client.HTTPConnection(url.netloc, timeout=60)
        buffer = bytearray(1 << 20)
        target = f"{url.path}?{url.query}" if url.query else url.path
        while True:
            with lock:
                start = next(starts, None)
            if start is None:
                return
            connection.request("GET", target, headers={"Range": f"bytes={start}-{min(size, start + part) - 1}"})
            answer = connection.getresponse()
            if answer.status != 206:
                failed.append(answer.status)
                return
            while count := answer.readinto(buffer):
                got[which] += count

    threads = [threading.Thread(target=fetch, args=(which,)) for which in range(parallel)]
    cpu, began = cpu_seconds(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if sum(got) != size or failed:
        sys.exit(f"{sum(got)} bytes of {size} came; refused: {failed}")
    print(json.dumps({"seconds": seconds, "cpu": cpu_seconds() - cpu}))


if __name__ == "__main__":
    main()
