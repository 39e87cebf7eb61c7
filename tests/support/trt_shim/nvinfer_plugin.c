/* libnvinfer_plugin.so.11 for the tensorrt bindings: TensorRT-RTX ships no plugin library, so there is none to
   initialize, and saying so succeeds. */
#include <stdbool.h>

bool initLibNvInferPlugins(void *logger, const char *name_space) {
    (void)logger;
    (void)name_space;
    return true;
}
