#!/bin/sh
# docker run IMAGE train CONFIG: a command of lte-scale. docker run IMAGE torchrun ...: any other program.
case ${1:-} in
    '' | -* | train | plan | preflight | shards | eval | export | report | top) exec lte-scale "$@" ;;
    *) exec "$@" ;;
esac
