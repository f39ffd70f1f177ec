"""A bucket on this machine: `python tests/bucket_server.py [--trouble SHARE] [--seed N]` prints its port and serves until it is ended.

gcp-storage-emulator with threads, with what it leaves out of generations (tensorstore asks for them, and makes its requests depend on
them), and with trouble: a SHARE of the requests is answered 429 or 503, or by hanging up. A bucket named 'locked' refuses to be written to.
"""

import argparse
import random
import socketserver
import threading
from functools import partial
from http import server
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage


class Handler(RequestHandler):
  trouble, chance, lock = 0.0, random.Random(0), threading.Lock()

  def _answer(self, handle) -> None:
    path = urlparse(self.path).path
    if '/b/locked/' in path and self.command != 'GET':
      return self._refuse(403)
    if self.chance.random() < self.trouble:
      kind = self.chance.choice([429, 503, None])
      if kind is None:
        self.close_connection = True
        return None
      return self._refuse(kind)
    with self.lock:  # the emulator's memory is not made for threads
      self.generation = self._generation(path)
      query = parse_qs(urlparse(self.path).query)
      if query.get('ifGenerationMatch', [self.generation])[0] != self.generation:
        return self._refuse(412)
      if query.get('ifGenerationNotMatch', [None])[0] == self.generation:
        return self._refuse(304)
      return handle()

  def _generation(self, path: str) -> str:
    """Of the object that a request is about; '0' if there is none."""
    bucket, _, name = path.partition('/b/')[2].partition('/o')
    name = name.removeprefix('/') or parse_qs(urlparse(self.path).query).get('name', [''])[0]
    try:
      return self.storage.get_file_obj(bucket, unquote(name))['generation']
    except NotFound:
      return '0'

  def end_headers(self) -> None:
    if getattr(self, 'generation', '0') != '0':
      self.send_header('x-goog-generation', self.generation)
    super().end_headers()

  def _refuse(self, code: int) -> None:
    self.rfile.read(int(self.headers.get('Content-Length') or 0))
    self.send_response(code)
    self.send_header('Content-Length', '0')
    self.end_headers()

  def do_GET(self):
    self._answer(super().do_GET)

  def do_POST(self):
    self._answer(super().do_POST)

  def do_DELETE(self):
    self._answer(super().do_DELETE)

  def do_PUT(self):
    self._answer(super().do_PUT)

  def do_PATCH(self):
    self._answer(super().do_PATCH)


class Server(socketserver.ThreadingMixIn, server.HTTPServer):
  daemon_threads = True

  def handle_error(self, request, client_address):
    """A killed run hangs up in the middle: nothing to report."""


if __name__ == '__main__':
  parser = argparse.ArgumentParser()
  parser.add_argument('--trouble', type=float, default=0.0)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  Handler.trouble, Handler.chance = args.trouble, random.Random(args.seed)
  storage = Storage(use_memory_fs=True)
  for name in ('runs', 'locked'):
    buckets.create_bucket(name, storage)
  with Server(('127.0.0.1', 0), partial(Handler, storage)) as served:
    print(served.server_address[1], flush=True)
    served.serve_forever()
