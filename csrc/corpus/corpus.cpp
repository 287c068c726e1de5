// The Python module lmengine._corpus: tokenises, counts and encodes text as a stream, and adds
// counts of its pieces. Its Python face, with the documentation, is lmengine/embeddings/.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <unordered_map>

#include "corpus/merge.h"
#include "corpus/tokeniser.h"

namespace py = pybind11;

namespace lmengine::corpus {
namespace {

constexpr size_t kReadBytes = 1 << 20;
const std::string kText = "text";  // what a string given from Python is called in errors

CharacterTable make_table() {
  CharacterTable table;
  table.kinds.resize(CharacterTable::size);
  table.lower.resize(CharacterTable::size);
  const py::object category = py::module_::import("unicodedata").attr("category");
  for (char32_t c = 0; c < CharacterTable::size; ++c) {
    table.lower[c] = Py_UNICODE_TOLOWER(c);
    const bool han = c == 0x3007 || (c >= 0x3400 && c <= 0x4dbf) || (c >= 0x4e00 && c <= 0x9fff) ||
                     (c >= 0xf900 && c <= 0xfaff);
    if (han) {
      table.kinds[c] = Kind::han;
      continue;
    }
    if (Py_UNICODE_ISSPACE(c)) {
      table.kinds[c] = Kind::space;
      continue;
    }
    const auto name =
        category(py::str(PyUnicode_FromOrdinal(static_cast<int>(c)))).cast<std::string>();
    switch (name[0]) {
      case 'L':
      case 'M':
        table.kinds[c] = Kind::letter;
        break;
      case 'N':
        table.kinds[c] = Kind::digit;
        break;
      case 'Z':
        table.kinds[c] = Kind::space;
        break;
      case 'C':
        table.kinds[c] = name == "Cc" ? Kind::space : name == "Cf" ? Kind::ignored : Kind::symbol;
        break;
      default:
        table.kinds[c] = Kind::symbol;
    }
  }
  return table;
}

const CharacterTable& table() {
  static const CharacterTable made = make_table();
  return made;
}

Breaks breaks_of(const std::string& name) {
  if (name == "line") return Breaks::line;
  if (name == "paragraph") return Breaks::paragraph;
  if (name == "file") return Breaks::file;
  throw std::invalid_argument("breaks: expected 'line', 'paragraph' or 'file', got '" + name + "'");
}

bool replaces(const std::string& errors) {
  if (errors != "strict" && errors != "replace")
    throw std::invalid_argument("errors: expected 'strict' or 'replace', got '" + errors + "'");
  return errors == "replace";
}

struct FileError {
  int code;
  std::string path;
};

// A file read in pieces.
class File {
 public:
  explicit File(std::string path) : path_(std::move(path)), file_(std::fopen(path_.c_str(), "rb")) {
    if (!file_) fail();
  }
  ~File() {
    if (file_) std::fclose(file_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const std::string& path() const { return path_; }

  // The next bytes; none at the end of the file. They are good until the next call.
  std::string_view read() {
    buffer_.resize(kReadBytes);
    errno = 0;
    const size_t count = std::fread(buffer_.data(), 1, buffer_.size(), file_);
    if (count == 0 && std::ferror(file_)) fail();
    return {buffer_.data(), count};
  }

 private:
  [[noreturn]] void fail() const { throw FileError{errno, path_}; }

  std::string path_;
  std::FILE* file_;
  std::vector<char> buffer_;
};

struct TokenHash {
  using is_transparent = void;
  size_t operator()(std::string_view token) const { return std::hash<std::string_view>{}(token); }
};

template <class Value>
using TokenMap = std::unordered_map<std::string, Value, TokenHash, std::equal_to<>>;

struct ListSink {
  std::vector<std::string> tokens;
  void token(std::string_view token) { tokens.emplace_back(token); }
  void text_break() {}
};

std::vector<std::string> tokenise(std::string_view text) {
  ListSink sink;
  Tokeniser<ListSink> tokeniser(table(), sink, Breaks::file, false);
  tokeniser.feed(text, kText);
  tokeniser.end_of_file(kText);
  return std::move(sink.tokens);
}

// Counts tokens in bounded memory: when there are more than max_entries of them, the rarest go.
class Counter {
 public:
  explicit Counter(size_t max_entries) : max_entries_(max_entries) {
    if (max_entries == 0) throw std::invalid_argument("max_entries: expected at least 1, got 0");
    table();
  }

  void token(std::string_view token) {
    const auto found = counts_.find(token);
    if (found != counts_.end()) {
      ++found->second;
      return;
    }
    counts_.emplace(token, 1);
    if (counts_.size() > max_entries_) prune();
  }
  void text_break() {}

  void add_file(const std::string& path, const std::string& errors) {
    const bool replace = replaces(errors);
    const py::gil_scoped_release release;
    File file(path);
    Tokeniser<Counter> tokeniser(table(), *this, Breaks::file, replace);
    for (std::string_view bytes = file.read(); !bytes.empty(); bytes = file.read())
      tokeniser.feed(bytes, path);
    tokeniser.end_of_file(path);
  }

  void add_text(std::string_view text) {
    Tokeniser<Counter> tokeniser(table(), *this, Breaks::file, false);
    tokeniser.feed(text, kText);
    tokeniser.end_of_file(kText);
  }

  void add_token(std::string_view token) { this->token(token); }

  // By falling count; tokens that occur equally often in the order of their bytes.
  std::vector<std::pair<std::string, int64_t>> most_common(int64_t min_count,
                                                           size_t max_size) const {
    std::vector<std::pair<std::string, int64_t>> result;
    for (const auto& [token, count] : counts_)
      if (count >= min_count) result.emplace_back(token, count);
    std::sort(result.begin(), result.end(), [](const auto& a, const auto& b) {
      return a.second != b.second ? a.second > b.second : a.first < b.first;
    });
    if (result.size() > max_size) result.resize(max_size);
    return result;
  }

  // A token may have been counted so many times too few, and none if it occurred no oftener.
  int64_t lost() const { return lost_; }

 private:
  void prune() {
    // a tenth of the room is made at least, so that pruning stays rare
    int64_t threshold = 0;
    while (counts_.size() > max_entries_ - max_entries_ / 10) {
      ++threshold;
      std::erase_if(counts_, [=](const auto& entry) { return entry.second <= threshold; });
    }
    lost_ += threshold;
  }

  TokenMap<int64_t> counts_;
  size_t max_entries_;
  int64_t lost_ = 0;
};

// Turns text into the numbers of a vocabulary's tokens; -1 stands between texts.
class Encoder {
 public:
  Encoder(const std::vector<std::string>& tokens, std::optional<int32_t> unknown)
      : unknown_(unknown) {
    table();
    for (size_t i = 0; i < tokens.size(); ++i)
      if (!numbers_.emplace(tokens[i], static_cast<int32_t>(i)).second)
        throw std::invalid_argument("tokens: '" + tokens[i] + "' stands twice, again at number " +
                                    std::to_string(i));
  }

  py::array_t<int32_t> encode_text(std::string_view text, const std::string& breaks) const {
    Sink sink{*this, {}};
    Tokeniser<Sink> tokeniser(table(), sink, breaks_of(breaks), false);
    tokeniser.feed(text, kText);
    tokeniser.end_of_file(kText);
    return sink.take(true);
  }

  // A token for text_break, or for a token of the vocabulary.
  struct Sink {
    const Encoder& encoder;
    std::vector<int32_t> numbers;
    bool broken = true;  // the last number of the stream so far is a break, or there is none

    void token(std::string_view token) {
      const auto found = encoder.numbers_.find(token);
      if (found != encoder.numbers_.end()) {
        numbers.push_back(found->second);
      } else if (encoder.unknown_) {
        numbers.push_back(*encoder.unknown_);
      } else {
        return;
      }
      broken = false;
    }
    void text_break() {
      if (!broken) numbers.push_back(-1);
      broken = true;
    }
    py::array_t<int32_t> take(bool drop_last_break) {
      if (drop_last_break && !numbers.empty() && numbers.back() == -1) numbers.pop_back();
      auto owned = std::make_unique<std::vector<int32_t>>(std::move(numbers));
      numbers.clear();
      auto* vector = owned.get();
      const py::capsule owner(
          owned.release(), [](void* memory) { delete static_cast<std::vector<int32_t>*>(memory); });
      return py::array_t<int32_t>(vector->size(), vector->data(), owner);
    }
  };

 private:
  TokenMap<int32_t> numbers_;
  std::optional<int32_t> unknown_;
};

// Encodes files one after another, in arrays of about max_tokens.
class EncodedFiles {
 public:
  EncodedFiles(const Encoder& encoder, std::vector<std::string> paths, const std::string& breaks,
               const std::string& errors, size_t max_tokens)
      : sink_{encoder, {}},
        tokeniser_(table(), sink_, breaks_of(breaks), replaces(errors)),
        paths_(std::move(paths)),
        max_tokens_(max_tokens) {
    if (max_tokens == 0) throw std::invalid_argument("max_tokens: expected at least 1, got 0");
  }

  py::array_t<int32_t> next() {
    {
      const py::gil_scoped_release release;
      while (sink_.numbers.size() < max_tokens_ && next_path_ < paths_.size()) {
        const std::string& path = paths_[next_path_];
        if (!file_) file_ = std::make_unique<File>(path);
        const std::string_view bytes = file_->read();
        if (!bytes.empty()) {
          tokeniser_.feed(bytes, path);
          continue;
        }
        tokeniser_.end_of_file(path);
        file_.reset();
        ++next_path_;
      }
    }
    if (sink_.numbers.empty()) throw py::stop_iteration();
    return sink_.take(false);
  }

 private:
  Encoder::Sink sink_;
  Tokeniser<Encoder::Sink> tokeniser_;
  std::vector<std::string> paths_;
  size_t next_path_ = 0;
  size_t max_tokens_;
  std::unique_ptr<File> file_;
};

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using CountArrays = std::tuple<Array<int32_t>, Array<int32_t>, Array<double>>;

// The sum of two sorted lists of counts: rows, columns and values of each.
CountArrays add_count_arrays(const CountArrays& one, const CountArrays& other, int64_t threads) {
  const auto counts = [](const CountArrays& arrays) {
    const auto& [rows, columns, values] = arrays;
    if (rows.ndim() != 1 || columns.size() != rows.size() || values.size() != rows.size())
      throw std::invalid_argument("counts: expected three arrays of one length");
    return Counts{rows.data(), columns.data(), values.data(), rows.size()};
  };
  const Counts a = counts(one), b = counts(other);
  CountArrays sum;
  const py::gil_scoped_release release;
  const auto allocate = [&](int64_t length) {
    const py::gil_scoped_acquire acquire;
    auto& [rows, columns, values] = sum;
    rows = Array<int32_t>(length);
    columns = Array<int32_t>(length);
    values = Array<double>(length);
    return std::tuple(rows.mutable_data(), columns.mutable_data(), values.mutable_data());
  };
  add_counts(a.length < b.length ? b : a, a.length < b.length ? a : b, threads, allocate);
  return sum;
}

}  // namespace

PYBIND11_MODULE(_corpus, m) {
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const FileError& failed) {
      const py::object os_error = py::reinterpret_borrow<py::object>(PyExc_OSError);
      py::set_error(os_error, py::make_tuple(failed.code, std::strerror(failed.code), failed.path));
    }
  });
  m.def("tokenise", &tokenise, py::arg("text"));
  m.def("add_counts", &add_count_arrays, py::arg("one"), py::arg("other"), py::arg("threads"));
  py::class_<Counter>(m, "Counter")
      .def(py::init<size_t>(), py::arg("max_entries"))
      .def("add_file", &Counter::add_file, py::arg("path"), py::arg("errors"))
      .def("add_text", &Counter::add_text, py::arg("text"))
      .def("add_token", &Counter::add_token, py::arg("token"))
      .def("most_common", &Counter::most_common, py::arg("min_count"), py::arg("max_size"))
      .def_property_readonly("lost", &Counter::lost);
  py::class_<Encoder>(m, "Encoder")
      .def(py::init<const std::vector<std::string>&, std::optional<int32_t>>(), py::arg("tokens"),
           py::arg("unknown"))
      .def("encode_text", &Encoder::encode_text, py::arg("text"), py::arg("breaks"));
  py::class_<EncodedFiles>(m, "EncodedFiles")
      .def(py::init<const Encoder&, std::vector<std::string>, const std::string&,
                    const std::string&, size_t>(),
           py::arg("encoder"), py::arg("paths"), py::arg("breaks"), py::arg("errors"),
           py::arg("max_tokens"), py::keep_alive<1, 2>())
      .def("__iter__", [](EncodedFiles& self) -> EncodedFiles& { return self; })
      .def("__next__", &EncodedFiles::next);
}

}  // namespace lmengine::corpus
