"""Data room: from files to batches of records, the first stage of the training path.

A *source* is a random-access object: `len(source)`, `source[i]` giving a dict of arrays, `.name`,
and for labelled images `.num_classes`. Image records are `{"image": uint8 [H W 3], "label": int32
[]}`, cached-token records `{"tokens": int32 [gh gw], "label": int32 []}`, stored-token records the
same with all crops, [crops gh gw]. Records of images with texts are `{"image": uint8 [H W 3],
"caption": str}`, or with an array of texts; their sources tell the size of an image without reading
all of it, `image_size(i)`.

- `digits`, `canvases`, `folder`, `tfds`, `arrays`, `token_records`: the sources.
- `captions`, `webdataset`: sources of images with texts; `tfds` has one, too.
- `buckets`: sizes for images of any shape, and which image goes to which.
- `token_dataset`: what stored tokens are, and the description beside them.
- `token_buckets`: stored tokens of several grids, a source for each.
- `crops`: the views of an image whose tokens are stored.
- `transforms`: record → record, with a generator where something is drawn.
- `pipeline`: source, or sources by size → shuffled, sharded, batched iterator that resumes exactly.

Nothing here imports another room or TensorFlow.
"""
