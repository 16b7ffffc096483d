// Which set of inner loops this machine can run.
#include <cstring>

#include "codebook_tiles.h"
#include "tiles.h"
#include "trellis_tiles.h"

namespace base { extern const Tiles table; extern const CodebookTiles codebook_table; extern const TrellisTiles trellis_table; }
#ifdef CLUSCOMP_X86
namespace avx2 { extern const Tiles table; extern const CodebookTiles codebook_table; extern const TrellisTiles trellis_table; }
namespace avx512 { extern const Tiles table; extern const CodebookTiles codebook_table; extern const TrellisTiles trellis_table; }
namespace avx512vbmi { extern const CodebookTiles codebook_table; }
#endif

static bool machine_has(const char* name) {
  if (!std::strcmp(name, "base")) return true;
#ifdef CLUSCOMP_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (!std::strcmp(name, "avx2")) return avx2;
  if (!std::strcmp(name, "avx512")) return avx512;
  if (!std::strcmp(name, "avx512vbmi")) return avx512 && __builtin_cpu_supports("avx512vbmi");
#endif
  return false;
}

const Tiles* tiles_named(const char* name) {
  if (!machine_has(name)) return nullptr;
#ifdef CLUSCOMP_X86
  if (!std::strcmp(name, "avx512")) return &avx512::table;
  if (!std::strcmp(name, "avx2")) return &avx2::table;
#endif
  return std::strcmp(name, "base") ? nullptr : &base::table;
}

const CodebookTiles* codebook_tiles_named(const char* name) {
  if (!machine_has(name)) return nullptr;
#ifdef CLUSCOMP_X86
  if (!std::strcmp(name, "avx512vbmi")) return &avx512vbmi::codebook_table;
  if (!std::strcmp(name, "avx512")) return &avx512::codebook_table;
  if (!std::strcmp(name, "avx2")) return &avx2::codebook_table;
#endif
  return std::strcmp(name, "base") ? nullptr : &base::codebook_table;
}

const TrellisTiles* trellis_tiles_named(const char* name) {
  if (!machine_has(name)) return nullptr;
#ifdef CLUSCOMP_X86
  if (!std::strcmp(name, "avx512")) return &avx512::trellis_table;
  if (!std::strcmp(name, "avx2")) return &avx2::trellis_table;
#endif
  return std::strcmp(name, "base") ? nullptr : &base::trellis_table;
}

static const char* const newest_first[] = {"avx512vbmi", "avx512", "avx2"};

const Tiles& tiles() {
  for (const char* name : newest_first)
    if (const Tiles* t = tiles_named(name)) return *t;
  return base::table;
}

const CodebookTiles& codebook_tiles() {
  for (const char* name : newest_first)
    if (const CodebookTiles* t = codebook_tiles_named(name)) return *t;
  return base::codebook_table;
}

const TrellisTiles& trellis_tiles() {
  for (const char* name : newest_first)
    if (const TrellisTiles* t = trellis_tiles_named(name)) return *t;
  return base::trellis_table;
}
