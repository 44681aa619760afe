"""How curate.py's second pass grows: python tests/many_tracks.py VIDEOS, ten tracks each. The suite runs ten.

Writes made-up rows (ten tracks an identity over random videos, cosine of two of them about 0.74, three
references a track) to a temporary folder and times curate.group. Needs 20 KB and 42 files a video.
"""
import io
import resource
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from videos import curate

TRACKS, WIDTH = 10, 512


def unit(*shape, generator):
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def write_rows(folder, videos):
    generator, file = torch.Generator().manual_seed(0), io.BytesIO()
    Image.new("RGB", (64, 64), "gray").save(file, "PNG")
    people = unit(videos, WIDTH, generator=generator)
    who = torch.randperm(videos * TRACKS, generator=generator) % videos
    turns = [("front", 0), ("left", -60), ("right", 60)]
    for v in range(videos):
        row = folder / f"{v:016x}"
        row.mkdir(parents=True)
        mean = people[who[v * TRACKS:(v + 1) * TRACKS]]
        tracks = F.normalize(mean + 0.6 * unit(TRACKS, WIDTH, generator=generator), dim=1)
        refs = tracks.repeat_interleave(len(turns), 0)
        refs = F.normalize(refs + 0.3 * unit(len(refs), WIDTH, generator=generator), dim=1)
        curate.save_tensors(row / "embeddings.safetensors", {"embeddings": torch.cat((tracks, refs)).half()})
        facts = {"shots": [81 * k for k in range(TRACKS + 1)], "yaw": [1] * 36, "dropped": {}, "crowded": 0,
                 "sha256": f"{v}",
                 "tracks": [{"start": 81 * k, "end": 81 * k + 80} for k in range(TRACKS)],
                 "references": [{"track": k, "view": view, "frame": 81 * k, "yaw": yaw, "pitch": 0.0,
                                 "quality": 100.0 + k} for k in range(TRACKS) for view, yaw in turns],
                 "clips": [{"start": 81 * k, "tracks": [k], "sha256": f"{v} {k}"} for k in range(TRACKS)]}
        for k in range(TRACKS):
            (row / f"{81 * k}.mp4").write_bytes(b"clip")
            for view, _ in turns:
                (row / f"{k}_{view}.png").write_bytes(file.getvalue())
        curate.write_row(row, facts)
        yield row


def main(argv=None):
    videos, = map(int, argv or sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        rows = list(write_rows(Path(folder) / "out" / "rows", videos))
        (Path(folder) / "videos").mkdir()
        args = curate.read_arguments(["--videos", f"{folder}/videos", "--out", f"{folder}/out",
                                      "--faces", folder])
        cluster, spent = curate.cluster, []

        def timed(*arguments, **options):
            before = time.process_time()
            result = cluster(*arguments, **options)
            spent.append(time.process_time() - before)
            return result
        before = time.process_time()
        with mock.patch.object(curate, "cluster", timed):
            report = curate.group([f"{n}.mp4" for n in range(videos)], rows, args, {}, {})
        took, peak = time.process_time() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{videos * TRACKS:,} tracks: {took:.0f} CPU s, {spent[0]:.0f} of them clustering; peak "
              f"{peak:.2f} GiB; {report['identities']['found']:,} of {videos:,} identities")


if __name__ == "__main__":
    main()
