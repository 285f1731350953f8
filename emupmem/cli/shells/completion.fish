# Completion of emupmem for fish. Made by: emupmem completion fish
function __emupmem_words
    set -l typed (commandline -opc)
    set -e typed[1..(contains -i -- emupmem $typed; or echo 1)] # sudo before it
    set -l now (commandline -ct)
    set -l before (string match -r '^--[^=]*=' -- $now)
    for line in (sh -c @WORDS@ emupmem $typed "$now")
        switch $line
            case @files
                __fish_complete_path (string replace -r '^--[^=]*=' '' -- $now) | string replace -r '^' -- "$before"
            case @folders
                __fish_complete_directories (string replace -r '^--[^=]*=' '' -- $now) '' | string replace -r '^' -- "$before"
            case '*'
                echo "$before$line"
        end
    end
end
complete -c emupmem -f -a '(__emupmem_words)'
